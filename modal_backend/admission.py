"""Admission control: a request that cannot finish in time is refused at once, not queued.

The engine's speed is learnt from the work it completes, and the outstanding work is known, so the
wait of a new request can be estimated. A request is admitted if its wait is within `MAX_WAIT` and
it would finish well before its deadline. Within a role requests are served in order of arrival,
so what is admitted finishes. Queries wait for queries only, documents for both.

Once requests are refused because of the wait, they are refused until the queue has become
noticeably shorter. So `Retry-After` is a time worth waiting for, and not one free place that the
next arrival takes.

Work is measured in tokens: the estimated tokens of the texts, and what a text and a request cost
besides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Final

from kalm_integrations.batching import estimate_tokens
from kalm_integrations.errors import DeadlineExceededError, ServiceUnavailableError
from kalm_integrations.prompts import Role

MAX_WAITING: Final[dict[Role, int]] = {"query": 1024, "document": 16_384}
"""Most texts in the service, by role."""
MAX_WAIT: Final[dict[Role, float]] = {"query": 3.0, "document": 60.0}
"""Longest estimated wait in seconds, however late the deadline: after a burst of queries, new ones
are answered promptly again. Bulk jobs may queue for longer; queries do not wait for them."""
DEADLINE_SHARE: Final = 0.75
"""Share of a caller's deadline that wait and service may take by estimate; the rest is for errors
of the estimate."""
REOPEN_SHARE, REOPEN_SECONDS = 0.7, 2.1
"""By how much the wait must fall below the limit before requests are admitted again: this share of
it, but no more than these seconds."""
RETRY_AFTER: Final = 2.0
"""Seconds, where nothing is known about the wait."""

REQUEST_TOKENS: Final = 30
TEXT_TOKENS: Final = 2
"""Tokens whose computation costs as much as a request, or a text, costs besides its tokens."""
_CHUNK_TOKENS: Final = 4096
"""About the tokens of documents that a query has to wait for, since they are being computed."""
_WINDOW: Final = 0.1
_MEMORY: Final = {"faster": 1.0, "slower": 2.0}
"""Seconds of computing after which a changed speed is believed."""
_QUERY_MEMORY: Final = 2.0
"""Seconds over which the share of the engine's time that queries take is averaged."""


class EngineSpeed:
    """Learns how much work the engine completes in a second.

    The speed is measured in windows of `_WINDOW` seconds of computing. An engine that computes many
    texts together is slower while few are there, which says nothing about its capacity: so a slower
    window counts only if the engine had work for all of it.
    """

    def __init__(self) -> None:
        self.tokens_per_second: float | None = None
        """None before anything was measured."""
        self._start_window(0.0)

    def observe(self, work: float, seconds: float, outstanding: float) -> None:
        """Learn from completed work.

        Args:
            work: Completed work, in tokens.
            seconds: Of computing since the last observation.
            outstanding: Work that was in the service before it was completed, in tokens.
        """
        if self._done == self._seconds == 0:
            self._start_window(outstanding)
        self._done += work
        self._seconds += seconds
        if self._seconds < _WINDOW or not self._done:
            return
        measured = self._done / self._seconds
        known = self.tokens_per_second
        if known is None:
            self.tokens_per_second = measured
        elif measured > known or self._outstanding >= self._done:
            memory = _MEMORY["faster" if measured > known else "slower"]
            weight = 1 - math.exp(-self._seconds / memory)
            self.tokens_per_second = known + weight * (measured - known)
        self._start_window(0.0)

    def seconds(self, work: float) -> float:
        """Estimated seconds of computing that `work` takes; 0 before anything was measured."""
        return work / self.tokens_per_second if self.tokens_per_second else 0.0

    def _start_window(self, outstanding: float) -> None:
        self._done = self._seconds = 0.0
        self._outstanding = outstanding


class AdmittedRequest:
    """A request in the service."""

    def __init__(
        self, admission: Admission, role: Role, work: list[float], deadline: float | None
    ) -> None:
        self._admission = admission
        self._role = role
        self._work = work  # of the first n texts
        self._deadline = deadline
        self.done = 0.0
        """Completed work, in tokens."""

    @property
    def total(self) -> float:
        """Its work, in tokens."""
        return self._work[-1]

    def progress(self, texts: int) -> None:
        """Report that its first `texts` texts are computed.

        Raises:
            DeadlineExceededError: The rest cannot be computed before the deadline.
        """
        done = self._work[texts]
        self._admission.completed(self._role, done - self.done)
        self.done = done
        if self._deadline is not None and done < self.total:
            self._admission.check_deadline(self.total - done, self._deadline)


class Admission:
    """Decides which requests enter the service, and counts those inside.

    Args:
        limits: Most texts in the service, by role.
        clock: In seconds; `time.monotonic` unless a test simulates time.
    """

    def __init__(
        self,
        limits: dict[Role, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits or MAX_WAITING
        self._clock = clock
        self.in_progress: dict[Role, int] = {"query": 0, "document": 0}
        """Texts that are queued or computed, by role."""
        self.speed = EngineSpeed()
        self._outstanding: dict[Role, float] = {"query": 0.0, "document": 0.0}
        self._refusing: dict[Role, bool] = {"query": False, "document": False}
        self._since = 0.0
        """When the work was completed, or begun, that was observed last."""
        self._query_rate = 0.0
        """Work of queries completed in a second, in tokens, as of `_query_time`."""
        self._query_time = 0.0

    def wait(self, role: Role) -> float:
        """Estimated seconds that a new request of this role would wait."""
        queries, documents = self._outstanding["query"], self._outstanding["document"]
        if role == "query":
            return self.speed.seconds(queries + min(documents, _CHUNK_TOKENS))
        return self.speed.seconds(queries) + self._document_seconds(documents)

    def refusal(
        self, role: Role, texts: int, work: float, timeout: float | None
    ) -> ServiceUnavailableError | None:
        """Why a request is not admitted now, or None if it is.

        Args:
            role: Its role.
            texts: Number of its texts.
            work: Its work, in tokens.
            timeout: Seconds until its deadline; None has no deadline.
        """
        waiting = self.in_progress[role]
        if not waiting and (role == "query" or not self.in_progress["query"]):
            return None  # an idle service takes whatever its other limits allow
        wait = self.wait(role)
        own = self.speed.seconds(work) if role == "query" else self._document_seconds(work)
        time_left = math.inf if timeout is None else DEADLINE_SHARE * timeout
        limit = min(MAX_WAIT[role], time_left)
        reopen = limit - min(REOPEN_SHARE * limit, REOPEN_SECONDS)
        late = wait + own - time_left
        full = self._refusing[role] or wait > limit or late > 0
        self._refusing[role] = full and wait > reopen
        excess = max(wait - reopen if self._refusing[role] else 0.0, late)
        if waiting and waiting + texts > self._limits[role]:
            excess = max(excess, wait / 2)
        elif excess <= 0:
            return None
        # What cannot fit beside others has to come when the service is idle. A little later than
        # estimated: a retry that comes too early is refused again.
        known = self.speed.tokens_per_second is not None
        retry_after = 1.1 * min(excess, wait) + 0.02 if known else RETRY_AFTER
        if role == "document" and own > time_left:  # it has to wait for fewer queries
            retry_after = max(retry_after, RETRY_AFTER)
        return ServiceUnavailableError(
            f"{waiting:,} {role} texts are queued already, about {wait:.1f} s of work.",
            retry_after=retry_after,
        )

    @property
    def refusing(self) -> bool:
        """Whether requests of some role were refused because of the wait, and still would be."""
        return any(self._refusing.values())

    def check(self, role: Role, texts: Sequence[object], timeout: float | None) -> None:
        """Check whether `admit` would admit a request; its texts need not be valid.

        Raises:
            ServiceUnavailableError: It would not.
        """
        work = REQUEST_TOKENS + sum(work_of(text) for text in texts if isinstance(text, str))
        if refusal := self.refusal(role, len(texts), work, timeout):
            raise refusal

    @contextmanager
    def admit(
        self, role: Role, texts: Sequence[str], timeout: float | None = None
    ) -> Iterator[AdmittedRequest]:
        """Count a request as in progress while the block runs.

        Raises:
            ServiceUnavailableError: It would not finish in time; says when to retry.
        """
        work = list(accumulate(map(work_of, texts), initial=float(REQUEST_TOKENS)))
        work[0] = 0.0
        if refusal := self.refusal(role, len(texts), work[-1], timeout):
            raise refusal
        now = self._clock()
        if not any(self.in_progress.values()):
            self._since = now
        deadline = None if timeout is None else now + timeout
        request = AdmittedRequest(self, role, work, deadline)
        self.in_progress[role] += len(texts)
        self._outstanding[role] += request.total
        try:
            yield request
        finally:
            self.in_progress[role] -= len(texts)
            self._outstanding[role] -= request.total - request.done
            if not self.in_progress[role]:
                self._outstanding[role] = 0.0  # no rounding errors pile up
                self._refusing[role] = False

    def completed(self, role: Role, work: float) -> None:
        """Note completed work, in tokens."""
        now = self._clock()
        if work:
            outstanding = sum(self._outstanding.values())
            self.speed.observe(work, now - self._since, outstanding)
            self._outstanding[role] -= work
            self._since = now
            if role == "query":
                self._query_rate = self._queries_per_second(now) + work / _QUERY_MEMORY
                self._query_time = now

    def check_deadline(self, work: float, deadline: float) -> None:
        """Whether `work` tokens can still be computed by `deadline`, on this object's clock.

        Raises:
            DeadlineExceededError: They cannot, even if the speed is underestimated by a third. A
                request that is alone is computed all the same: it is what the speed is learnt from.
        """
        left = deadline - self._clock()
        hopeless = self.speed.seconds(work) > 1.5 * left
        alone = sum(self._outstanding.values()) <= work
        if left <= 0 or (hopeless and not alone):
            raise DeadlineExceededError("the rest would not be embedded before the deadline.")

    def _document_seconds(self, work: float) -> float:
        """Seconds that documents of `work` tokens take beside the queries that go first."""
        share_of_queries = self.speed.seconds(self._queries_per_second(self._clock()))
        return self.speed.seconds(work) / max(0.1, 1 - share_of_queries)

    def _queries_per_second(self, now: float) -> float:
        return self._query_rate * math.exp((self._query_time - now) / _QUERY_MEMORY)


def work_of(text: str) -> float:
    """The work of a text, in tokens."""
    size = len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
    return estimate_tokens(size) + TEXT_TOKENS
