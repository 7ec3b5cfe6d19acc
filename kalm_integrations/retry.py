"""The retry policy of requests: whether a failed one is sent again, and when.

It is the only one of a request. Below it, Modal's client repeats inputs that it has lost; bulk jobs
set a `max_retries` of their own. docs/errors.md has the formula.
"""

from __future__ import annotations

import random

from kalm_integrations.errors import KalmError, ServiceUnavailableError

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
BUDGET_PER_SUCCESS = 0.2


class RetryPolicy:
    """Decides for all requests of one session.

    A failure is retried if its class is `retryable`, at most `max_retries` times a request (fewer
    if its class says so), within the deadline and within a budget. The budget starts at
    `max_retries * max_concurrency` retries. Each retry takes one from it, and each success returns
    `BUDGET_PER_SUCCESS`. So a service that fails for hours does not get a multiple of its load.

    Args:
        max_retries: Most retries of a request.
        max_concurrency: Most concurrent requests of a role.
    """

    def __init__(self, max_retries: int, max_concurrency: int) -> None:
        self._max_retries = max_retries
        self._full = self._budget = float(max_retries * max_concurrency)

    def delay(self, retry: int, error: KalmError, time_left: float) -> float | None:
        """Seconds to wait before a retry, which this takes from the budget; None: do not retry.

        The delay is what the service requires, plus exponential backoff with full jitter, so that
        clients that failed together do not return together.

        Args:
            retry: Number of the retry; 0 is the first.
            error: What the last attempt failed with.
            time_left: Seconds until the deadline.
        """
        bounds = (self._max_retries, error.most_retries)
        if not error.retryable or retry >= min(bound for bound in bounds if bound is not None):
            return None
        retry_after = error.retry_after if isinstance(error, ServiceUnavailableError) else None
        backoff = min(LONGEST_DELAY, FIRST_DELAY * 2.0**retry)
        delay = (retry_after or 0.0) + random.uniform(0, backoff)  # noqa: S311
        if delay >= time_left or self._budget < 1:
            return None
        self._budget -= 1
        return delay

    def succeeded(self) -> None:
        """Return a part of a retry to the budget."""
        self._budget = min(self._full, self._budget + BUDGET_PER_SUCCESS)
