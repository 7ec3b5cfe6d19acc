"""The retry policy of requests: whether a failed one is sent again, and when.

Only these retries wait. `FailoverTransport` tries another server at once, and Modal's client
repeats inputs that it has lost. docs/errors.md has the formula.
"""

from __future__ import annotations

import logging
import random
import time

from kalm_integrations.errors import ConnectionFailedError, KalmError, ServiceUnavailableError

log = logging.getLogger(__name__)

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
LONGEST_RETRY_AFTER = 60.0
LONGEST_OUTAGE_DELAY = 2.0
FIRST_PATIENCE = 0.5
NEW_OUTAGE = 60.0  # seconds without a failure, until the next one begins another outage
BUDGET_PER_SUCCESS = 0.2
LOG_INTERVAL = 10.0  # seconds between two reports that the service fails


class RetryPolicy:
    """Decides for all requests of one session.

    A failure is retried if its class is `retryable`, at most `max_retries` times a request (fewer
    if its class says so), within the deadline and within a budget. The budget starts at
    `max_retries * max_concurrency` retries. Each retry takes one from it, and each success returns
    `BUDGET_PER_SUCCESS`. So a service that fails for hours does not get a multiple of its load.

    An outage is different: while nothing accepts connections, or a gateway reaches nothing, no
    request reaches the service, so retries take nothing from the budget and are not counted. They
    go on every two seconds at most, for as long as `max_retries` delays could take. If nothing was
    ever reached, the address may be wrong: `FIRST_PATIENCE` is the limit.

    Args:
        max_retries: Most retries of a request.
        max_concurrency: Most concurrent requests of a role.
    """

    def __init__(self, max_retries: int, max_concurrency: int) -> None:
        self._max_retries = max_retries
        self._full = self._budget = float(max_retries * max_concurrency)
        self._patience = sum(_backoff(retry) for retry in range(max_retries))
        self._reached = False
        self._outage_began = self._last_outage = self._last_success = float("-inf")
        self._failing_since: float | None = None
        self._last_failure = self._last_report = float("-inf")

    def is_outage(self, error: KalmError, began: float) -> bool:
        """Whether a failure belongs to an outage: nothing has succeeded since the attempt began.

        So a service that serves some requests and refuses others is not in an outage.
        """
        if not isinstance(error, ServiceUnavailableError) or not error.is_outage:
            return False
        if began < self._last_success:
            return False
        now = time.monotonic()
        if began - self._last_outage > NEW_OUTAGE:
            self._outage_began = now
        self._last_outage = now
        # A gateway may need longer for each answer: then the usual retries are left.
        unreached = isinstance(error, ConnectionFailedError)
        return unreached or now - self._outage_began < self._patience

    def delay(
        self, retry: int, error: KalmError, time_left: float, *, outage: bool = False
    ) -> float | None:
        """Seconds to wait before a retry, which this takes from the budget; None: do not retry.

        The delay is what the service requires, plus exponential backoff with full jitter, so that
        clients that failed together do not return together.

        Args:
            retry: Number of the retry, without those during outages; 0 is the first.
            error: What the last attempt failed with.
            time_left: Seconds until the deadline.
            outage: What `is_outage` returned.
        """
        now = time.monotonic()
        if error.retryable:
            self._last_failure = now
        if not (outage and isinstance(error, ConnectionFailedError)):
            self._reached = True
        delay = self._outage_delay(now) if outage else self._delay(retry, error)
        cost = 0.0 if outage else 1.0
        if delay is None or delay >= time_left or self._budget < cost:
            return None
        self._budget -= cost
        self._report_failure(error)
        return delay

    def succeeded(self, began: float) -> None:
        """Return a part of a retry to the budget.

        Args:
            began: When the attempt began, a time of `time.monotonic`.
        """
        self._reached, self._last_outage = True, float("-inf")
        self._last_success = time.monotonic()
        self._budget = min(self._full, self._budget + BUDGET_PER_SUCCESS)
        if self._failing_since is not None and began > self._last_failure:
            seconds = time.monotonic() - self._failing_since
            log.warning("the service serves requests again, after %.1f s", seconds)
            self._failing_since = None

    def _delay(self, retry: int, error: KalmError) -> float | None:
        bounds = (self._max_retries, error.most_retries)
        if not error.retryable or retry >= min(bound for bound in bounds if bound is not None):
            return None
        retry_after = error.retry_after if isinstance(error, ServiceUnavailableError) else None
        return min(retry_after or 0.0, LONGEST_RETRY_AFTER) + _jitter(_backoff(retry))

    def _outage_delay(self, now: float) -> float | None:
        elapsed = now - self._outage_began
        patience = self._patience if self._reached else min(FIRST_PATIENCE, self._patience)
        if elapsed >= patience:
            return None
        return _jitter(min(LONGEST_OUTAGE_DELAY, FIRST_DELAY + elapsed / 2))

    def _report_failure(self, error: KalmError) -> None:
        """Log the beginning of an outage, not each retry."""
        if not self._reached or self._failing_since is not None:
            return
        if self._last_failure - self._last_report >= LOG_INTERVAL:
            self._failing_since = self._last_report = self._last_failure
            log.warning("the service serves no requests, which are retried: %s", error)


def _backoff(retry: int) -> float:
    return min(LONGEST_DELAY, FIRST_DELAY * 2.0**retry)


def _jitter(longest: float) -> float:
    return random.uniform(0, longest)  # noqa: S311  # nosec B311
