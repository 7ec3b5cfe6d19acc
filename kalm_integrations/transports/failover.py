"""Several servers of one identity: the least busy gets a request, and one that fails is avoided.

A server's health is judged by its answers to requests only. The session compares the identities of
all answers, as it does with one server.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeVar

from kalm_integrations.errors import CanaryFailedError, KalmError, ServiceUnavailableError
from kalm_integrations.protocol import EmbedRequest, EmbedResponse, ServiceDescription

if TYPE_CHECKING:
    from kalm_integrations.transports.http import HttpTransport

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 60.0
HEDGED_SHARE: Final = 0.05
"""Of all queries, those that may be sent a second time."""
_MOST_SAVED: Final = 5.0  # hedges that quiet times leave for a bad one
_MEASURED: Final = 200  # queries whose times say what is slow
_FEWEST: Final = 20


class _Server:
    """One server, and what its answers say about it."""

    def __init__(self, name: str, transport: HttpTransport) -> None:
        self.name, self.transport = name, transport
        self.in_flight = self.failures = 0
        self.paused_until = self.last_used = float("-inf")

    @property
    def is_available(self) -> bool:
        """Whether it may get a request. After a pause, one request tries it."""
        tried_again = self.failures == 0 or self.in_flight == 0
        return tried_again and time.monotonic() >= self.paused_until

    async def send(self, call: Callable[[HttpTransport], Awaitable[T]], limit: float | None) -> T:
        """Send a request, and judge the answer, or that there is none within `limit` seconds."""
        began = self.last_used = time.monotonic()
        self.in_flight += 1
        try:
            answer = await _within(limit, call(self.transport))
        except KalmError as error:
            # Requests that failed together are one failure.
            if may_differ_elsewhere(error) and began >= self.paused_until:
                self._pause(error)
            raise
        finally:
            self.in_flight -= 1
        if self.failures:
            log.warning("%s serves requests again", self.name)
        self.failures, self.paused_until = 0, float("-inf")
        return answer

    def _pause(self, error: KalmError) -> None:
        seconds = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**self.failures)
        if isinstance(error, ServiceUnavailableError):
            seconds = min(LONGEST_PAUSE, max(seconds, error.retry_after or 0.0))
        if not self.failures:
            log.warning("%s fails; requests go to the other servers: %s", self.name, error)
        self.failures += 1
        self.paused_until = time.monotonic() + seconds


class FailoverTransport:
    """Sends each request to one of several transports, and to the next one if that fails.

    The session retries only what has failed on all servers that are not paused.

    Args:
        transports: By the names of their servers, for the log.
        hedge: Send a query to a second server if it takes longer than 95 % of the latest ones.
    """

    can_be_cold = True

    def __init__(self, transports: Mapping[str, HttpTransport], *, hedge: bool) -> None:
        self._servers = [_Server(name, transport) for name, transport in transports.items()]
        self._hedge = hedge
        self._hedges_left = 0.0
        self._seconds: deque[float] = deque(maxlen=_MEASURED)

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        began, deadline = time.monotonic(), _deadline(request)

        def call(transport: HttpTransport) -> Awaitable[EmbedResponse]:
            if request.timeout is None:
                return transport.embed(request)
            return transport.embed(replace(request, timeout=deadline - time.monotonic()))

        if not self._hedge or request.role != "query":
            return await self._first_answer(call, set(), deadline)
        answer = await self._hedged(call, deadline)
        self._seconds.append(time.monotonic() - began)
        return answer

    async def count_tokens(self, request: EmbedRequest) -> list[int]:
        return await self._first_answer(
            lambda transport: transport.count_tokens(request), set(), _deadline(request)
        )

    async def ensure_ready(self) -> ServiceDescription | None:
        return await self._first_answer(lambda transport: transport.ensure_ready(), set())

    async def close(self) -> None:
        for server in self._servers:
            await server.transport.close()

    async def _first_answer(
        self,
        call: Callable[[HttpTransport], Awaitable[T]],
        tried: set[_Server],
        deadline: float = float("inf"),
    ) -> T:
        """Send a request to one server after the other, until one answers.

        Args:
            call: Sends it.
            tried: Servers that have had it, which this adds to.
            deadline: When the session cancels it, a time of `time.monotonic`.

        Raises:
            KalmError: The last failure.
        """
        server = self._next(tried) or min(self._servers, key=lambda each: each.paused_until)
        while True:
            tried.add(server)
            left = deadline - time.monotonic()
            # One that hangs leaves time for another.
            limit = left / 2 if left < float("inf") and self._next(tried) is not None else None
            try:
                return await server.send(call, limit)
            except KalmError as error:
                another = self._next(tried)
                if another is None or not may_differ_elsewhere(error):
                    raise
                server = another

    def _next(self, tried: set[_Server]) -> _Server | None:
        """The least busy server that is not paused; the one that was used last comes last."""
        open_servers = [each for each in self._servers if each not in tried and each.is_available]
        return min(open_servers, key=lambda each: (each.in_flight, each.last_used), default=None)

    async def _hedged(self, call: Callable[[HttpTransport], Awaitable[T]], deadline: float) -> T:
        """The first answer of one server or, if that is slow, of two."""
        self._hedges_left = min(_MOST_SAVED, self._hedges_left + HEDGED_SHARE)
        tried: set[_Server] = set()
        tasks = {asyncio.ensure_future(self._first_answer(call, tried, deadline))}
        try:
            done, pending = await asyncio.wait(tasks, timeout=self._slow())
            if pending and self._hedges_left >= 1 and self._next(tried) is not None:
                self._hedges_left -= 1
                tasks.add(asyncio.ensure_future(self._first_answer(call, tried, deadline)))
            pending = tasks - done
            while pending and all(task.exception() for task in done):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            return min(done, key=lambda task: task.exception() is not None).result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _slow(self) -> float | None:
        """Seconds after which a query is slow; None while too few were measured."""
        if len(self._seconds) < _FEWEST:
            return None
        return sorted(self._seconds)[int(len(self._seconds) * 0.95)]


async def _within(limit: float | None, answer: Awaitable[T]) -> T:
    """The answer.

    Raises:
        ServiceUnavailableError: There is none within `limit` seconds.
    """
    try:
        async with asyncio.timeout(limit) as timer:
            return await answer
    except TimeoutError as error:
        if not timer.expired():
            raise
        raise ServiceUnavailableError(f"no answer within {limit:.3g} s.") from error


def _deadline(request: EmbedRequest) -> float:
    """When the session gives up, a time of `time.monotonic`."""
    return float("inf") if request.timeout is None else time.monotonic() + request.timeout


def may_differ_elsewhere(error: KalmError) -> bool:
    """Whether another server may answer a request that failed with `error`."""
    return error.retryable or isinstance(error, CanaryFailedError)
