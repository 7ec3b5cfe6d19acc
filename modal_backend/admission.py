"""Admission control: a request that cannot finish in time is refused at once, not queued.

The engine's speed is learnt from completed work, so the wait for the outstanding work can be
estimated. A request is admitted if its wait is within `MAX_WAIT` and it would finish well before
its deadline. Requests of a role are served in order of arrival, so admitted ones finish. Queries
wait for queries only, documents for both.

The limit of a request's wait is `MAX_WAIT`, or less if its deadline is early. Once a request is
refused because of the wait, requests with the same or a lower limit are refused until the queue is
noticeably shorter. So capacity is free after `Retry-After`, not just one slot for the next arrival.

Work is measured in tokens: the estimated tokens of the texts, and the overhead of texts and
requests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from kalm_integrations.batching import estimate_tokens
from kalm_integrations.errors import DeadlineExceededError, ServiceUnavailableError
from kalm_integrations.prompts import Role

MAX_WAITING: Final[dict[Role, int]] = {"query": 1024, "document": 16_384}
"""Most texts in the service, queued or being computed, by role."""
MAX_WAIT: Final[dict[Role, float]] = {"query": 3.0, "document": 60.0}
"""Longest estimated wait in seconds, even if the deadline is later: after a burst of queries, new
ones are answered promptly again. Bulk jobs may queue for longer; queries do not wait for them."""
DEADLINE_SHARE: Final = 0.75
"""Share of a caller's deadline for the estimated wait and service; the rest is a safety margin."""
REOPEN_SHARE, REOPEN_SECONDS = 0.7, 2.1
"""After a refusal the wait has to fall below its limit by this share of the limit, but by at most
this many seconds, before such requests are admitted again."""
RETRY_AFTER: Final = 2.0
"""Seconds after which to retry, if the speed is unknown."""

REQUEST_TOKENS: Final = 30
TEXT_TOKENS: Final = 2
"""Overhead of a request and of a text, in tokens."""
_CHUNK_TOKENS: Final = 4096
"""About the tokens of documents that are being computed when a query arrives."""
_WINDOW: Final = 0.1
"""Seconds of computing in one measurement of the speed."""
_MEMORY: Final = {"faster": 1.0, "slower": 2.0}
"""Time constant in seconds of computing with which a changed speed is adopted."""
_QUERY_MEMORY: Final = 2.0
"""Time constant in seconds of the average rate of queries."""


class EngineSpeed:
    """Learns the engine's speed.

    An engine that computes texts in batches is slower while there are few, which says nothing about
    its capacity. So a slower window counts only if the engine had work for all of it.
    """

    def __init__(self) -> None:
        self.tokens_per_second: float | None = None
        """None before the first measurement."""
        self._start_window(0.0)

    def observe(self, work: float, seconds: float, outstanding: float) -> None:
        """Learn from `work` tokens completed in `seconds` of computing, before which `outstanding`
        tokens were in the service."""
        if self._done == self._seconds == 0:
            self._start_window(outstanding)
        self._done += work
        self._seconds += seconds
        if self._seconds < _WINDOW or not self._done:
            return
        measured = self._done / self._seconds
        speed = self.tokens_per_second
        if speed is None:
            self.tokens_per_second = measured
        elif measured > speed or self._outstanding >= self._done:
            memory = _MEMORY["faster" if measured > speed else "slower"]
            weight = 1 - math.exp(-self._seconds / memory)
            self.tokens_per_second = speed + weight * (measured - speed)
        self._start_window(0.0)

    def seconds(self, work: float) -> float:
        """Estimated seconds of computing for `work`; 0 before the first measurement."""
        return work / self.tokens_per_second if self.tokens_per_second else 0.0

    def _start_window(self, outstanding: float) -> None:
        self._done = self._seconds = 0.0
        self._outstanding = outstanding


@dataclass
class AdmittedRequest:
    """A request in the service."""

    admission: Admission
    role: Role
    cumulative_work: list[float]  # in tokens, by the number of leading texts
    deadline: float | None
    done: float = 0.0  # completed work

    @property
    def total(self) -> float:
        """All its work."""
        return self.cumulative_work[-1]

    def progress(self, texts: int) -> None:
        """Record that the first `texts` texts are computed.

        Raises:
            DeadlineExceededError: The rest cannot be computed before the deadline.
        """
        done = self.cumulative_work[texts]
        self.admission.completed(self.role, done - self.done)
        self.done = done
        if self.deadline is not None and done < self.total:
            self.admission.check_deadline(self.total - done, self.deadline)


class Admission:
    """Admits requests and counts those in the service.

    Args:
        limits: Most texts in the service, by role.
        clock: The clock of deadlines, in seconds.
    """

    def __init__(
        self, limits: Mapping[Role, int] = MAX_WAITING, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._clock = clock
        self.texts_in_progress: dict[Role, int] = {"query": 0, "document": 0}
        """Texts that are queued or being computed, by role."""
        self.speed = EngineSpeed()
        self._outstanding: dict[Role, float] = {"query": 0.0, "document": 0.0}
        self._refused_limit: dict[Role, float] = {"query": 0.0, "document": 0.0}
        """Requests whose wait has about this limit, or a lower one, are refused until the queue is
        shorter, by role; 0 if none are."""
        self._since = 0.0
        """Time of the last observation, or of the start of the work after it."""
        self._query_rate = 0.0
        """Tokens of queries completed in a second, as of `_query_time`."""
        self._query_time = 0.0

    def wait(self, role: Role) -> float:
        """Estimated seconds that a new request of this role would wait."""
        queries, documents = self._outstanding["query"], self._outstanding["document"]
        if role == "query":
            return self.speed.seconds(queries + min(documents, _CHUNK_TOKENS))
        return self.speed.seconds(queries) + self._document_seconds(documents)

    @property
    def refusing(self) -> bool:
        """Whether requests of some role were refused because of the wait, and still would be."""
        return any(self._refused_limit.values())

    def reopens_in(self, role: Role) -> float:
        """Estimated seconds until requests of a role that are refused now are admitted again; 0 or
        less if none are."""
        limit = self._refused_limit[role]
        return self.wait(role) - _reopening_wait(limit) if limit else 0.0

    def check(self, role: Role, texts: Sequence[object], deadline: float | None) -> None:
        """Raise the `ServiceUnavailableError` of `admit`, if there is one, for texts that may be
        invalid."""
        work = REQUEST_TOKENS + sum(work_of(text) for text in texts if isinstance(text, str))
        self._decide(role, len(texts), work, deadline)

    def _decide(self, role: Role, texts: int, work: float, deadline: float | None) -> None:
        """Decide whether a request with so many texts and tokens is admitted now, and remember
        until when requests like it are refused.

        Raises:
            ServiceUnavailableError: It is not admitted; with the time of a retry.
        """
        present = self.texts_in_progress[role]
        if not present and (role == "query" or not self.texts_in_progress["query"]):
            return  # an idle service admits everything
        wait = self.wait(role)
        own = self.speed.seconds(work) if role == "query" else self._document_seconds(work)
        time_left = math.inf if deadline is None else DEADLINE_SHARE * (deadline - self._clock())
        limit = min(MAX_WAIT[role], time_left)
        if present:  # at about this wait, as many texts are in the service as there may be
            limit = min(limit, wait * max(0, self._limits[role] - texts) / present)
        late = wait + own - time_left
        if wait <= _reopening_wait(self._refused_limit[role]):
            self._refused_limit[role] = 0.0
        excess = max(late, 0.0)
        reopening = _reopening_wait(limit)
        full = wait > limit or late > 0 or limit <= 1.1 * self._refused_limit[role]
        if full and wait > reopening:
            self._refused_limit[role] = max(limit, self._refused_limit[role])
            excess = max(wait - reopening, late)
        if present and present + texts > self._limits[role]:
            excess = max(excess, wait / 2)
        elif excess <= 0:
            return
        # At the latest when the service is idle.
        known = self.speed.tokens_per_second is not None
        seconds = retry_after(min(excess, wait)) if known else RETRY_AFTER
        if role == "document" and own > time_left:  # it has to wait for fewer queries
            seconds = max(seconds, RETRY_AFTER)
        message = (
            f"{present:,} {role} texts are queued or being computed, about {wait:.1f} s of work"
        )
        if late > 0:
            message += "; this request would end after its deadline, or too close to it"
        raise ServiceUnavailableError(f"{message}.", seconds)

    @contextmanager
    def admit(
        self, role: Role, texts: Sequence[str], deadline: float | None = None
    ) -> Iterator[AdmittedRequest]:
        """Count a request as in progress while the block runs.

        Args:
            role: Its role.
            texts: Its texts.
            deadline: A time of the clock.

        Raises:
            ServiceUnavailableError: It would not finish in time; with the time of a retry.
        """
        work = list(accumulate(map(work_of, texts), initial=float(REQUEST_TOKENS)))
        work[0] = 0.0
        self._decide(role, len(texts), work[-1], deadline)
        if not any(self.texts_in_progress.values()):
            self._since = self._clock()
        request = AdmittedRequest(self, role, work, deadline)
        self.texts_in_progress[role] += len(texts)
        self._outstanding[role] += request.total
        try:
            yield request
        finally:
            self.texts_in_progress[role] -= len(texts)
            self._outstanding[role] -= request.total - request.done
            if not self.texts_in_progress[role]:
                self._outstanding[role] = 0.0  # without accumulated rounding errors
                self._refused_limit[role] = 0.0

    def completed(self, role: Role, work: float) -> None:
        """Record completed work, in tokens."""
        now = self._clock()
        if work:
            outstanding = sum(self._outstanding.values())
            self.speed.observe(work, now - self._since, outstanding)
            self._outstanding[role] -= work
            self._since = now
            if role == "query":
                self._query_rate = self._current_query_rate(now) + work / _QUERY_MEMORY
                self._query_time = now

    def check_deadline(self, work: float, deadline: float) -> None:
        """Check whether `work` tokens can still be computed by `deadline`.

        Raises:
            DeadlineExceededError: They cannot, even if the real speed is 1.5 times the estimate. A
                request that is alone is computed nevertheless: the speed is learnt from it.
        """
        left = deadline - self._clock()
        too_slow = self.speed.seconds(work) > 1.5 * left
        alone = sum(self._outstanding.values()) <= work
        if left <= 0 or (too_slow and not alone):
            raise DeadlineExceededError("the rest would not be embedded before the deadline.")

    def _document_seconds(self, work: float) -> float:
        """Estimated seconds for `work` of documents, in the time that queries leave."""
        query_share = self.speed.seconds(self._current_query_rate(self._clock()))
        return self.speed.seconds(work) / max(0.1, 1 - query_share)

    def _current_query_rate(self, now: float) -> float:
        return self._query_rate * math.exp((self._query_time - now) / _QUERY_MEMORY)


def _reopening_wait(limit: float) -> float:
    """The wait at which requests with this limit are admitted again after a refusal."""
    return limit - min(REOPEN_SHARE * limit, REOPEN_SECONDS)


def retry_after(wait: float) -> float:
    """Seconds after which to retry, for an estimated wait. A little later, since a retry that comes
    too early is refused again."""
    return 1.1 * wait + 0.02


def work_of(text: str) -> float:
    """The work of a text, in tokens."""
    size = len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
    return estimate_tokens(size) + TEXT_TOKENS
