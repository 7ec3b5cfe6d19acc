"""When to try again: the only place that decides it."""

from __future__ import annotations

import random

from kalm_integrations.errors import KalmError, ServiceUnavailableError

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0


class RetryBudget:
    """Bounds the retries of a session: a full pot at first, a fifth of a retry for each success.

    Every request in flight may use all its retries once; a service that fails for hours is not
    hit with a multiple of the load that it cannot take.
    """

    def __init__(self, full: float) -> None:
        self._full = self._left = full

    def spend(self) -> bool:
        """Take one retry, if there is one."""
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def earn(self) -> None:
        """A request succeeded."""
        self._left = min(self._full, self._left + 0.2)


def delay_before(retry: int, error: KalmError, max_retries: int) -> float | None:
    """Seconds to wait before retry number `retry` (0 is the first), or None: do not retry.

    Exponential backoff with full jitter, so that clients that failed together do not come back
    together; never sooner than the service asked.
    """
    if not error.retryable or retry >= min(max_retries, error.most_retries):
        return None
    asked = (error.retry_after if isinstance(error, ServiceUnavailableError) else None) or 0.0
    asked = asked if asked > 0 else 0.0  # a service may say anything, even NaN
    jitter = random.uniform(0, min(LONGEST_DELAY, FIRST_DELAY * 2.0**retry))  # noqa: S311
    return asked + jitter
