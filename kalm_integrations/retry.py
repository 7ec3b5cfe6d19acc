"""The retry policy: whether a failed request is sent again, and when. Nothing else decides it."""

from __future__ import annotations

import random

from kalm_integrations.errors import KalmError, ServiceUnavailableError

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
EARNED = 0.2  # of a retry, for each request that succeeds


class RetryPolicy:
    """Decides for all requests of one session.

    A failure is retried if its class is `retryable`, at most `max_retries` times a request (fewer
    if its class says so), within the deadline, and within a budget. The budget is full at first:
    each of the requests that run at a time may use all its retries once. A service that fails for
    hours gets no multiple of the load that it cannot take.

    Args:
        max_retries: Most retries of a request.
        max_concurrency: Most requests at a time.
    """

    def __init__(self, max_retries: int, max_concurrency: int) -> None:
        self._max_retries = max_retries
        self._full = self._budget = float(max_retries * max_concurrency)

    def delay(self, retry: int, error: KalmError, time_left: float) -> float | None:
        """Seconds to wait before a retry, which this takes from the budget; None: do not retry.

        Exponential backoff with full jitter, so that clients that failed together do not return
        together; never sooner than the service requires.

        Args:
            retry: Number of the retry; 0 is the first.
            error: What the last attempt failed with.
            time_left: Seconds until the deadline.
        """
        if not error.retryable or retry >= min(self._max_retries, error.most_retries):
            return None
        retry_after = error.retry_after if isinstance(error, ServiceUnavailableError) else None
        # A service may send anything as its time, even NaN.
        delay = retry_after if retry_after is not None and retry_after > 0 else 0.0
        delay += random.uniform(0, min(LONGEST_DELAY, FIRST_DELAY * 2.0**retry))  # noqa: S311
        if delay >= time_left or self._budget < 1:
            return None
        self._budget -= 1
        return delay

    def succeeded(self) -> None:
        """Return a part of a retry to the budget."""
        self._budget = min(self._full, self._budget + EARNED)
