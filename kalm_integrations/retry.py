"""When to try again: the only place that decides it."""

from __future__ import annotations

import random

from kalm_integrations.errors import KalmError, ServiceUnavailableError

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0


def delay_before(retry: int, error: KalmError, max_retries: int) -> float | None:
    """Seconds to wait before retry number `retry` (0 is the first), or None: do not retry.

    Exponential backoff with full jitter, so that clients that failed together do not come back
    together; never sooner than the service asked.
    """
    if not error.retryable or retry >= max_retries:
        return None
    asked = (error.retry_after if isinstance(error, ServiceUnavailableError) else None) or 0.0
    asked = asked if asked > 0 else 0.0  # a service may say anything, even NaN
    jitter = random.uniform(0, min(LONGEST_DELAY, FIRST_DELAY * 2.0**retry))  # noqa: S311
    return asked + jitter
