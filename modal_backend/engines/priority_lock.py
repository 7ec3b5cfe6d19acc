"""A lock that is granted by priority: queries first, then in order of arrival.

A call that is computed in several chunks releases the lock between them, so that a query can go
first. It keeps its ticket, so that calls of one priority finish one after the other.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager

from kalm_integrations.batching import estimate_tokens
from modal_backend.engines.base import PRIORITY

Ticket = tuple[int, int]
"""Priority and number of arrival: the order in which the lock is granted."""


class PriorityLock:
    """A lock for the tasks of one event loop.

    Args:
        extra_queries: Number of further queries that may hold it, so that the next one is ready
            when the engine becomes free, even if the event loop is busy then.
    """

    def __init__(self, extra_queries: int = 0) -> None:
        self._extra_queries = extra_queries
        self._holders = 0
        self._waiting: list[tuple[Ticket, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    def ticket(self, priority: int) -> Ticket:
        """Return a ticket that comes after those of earlier arrivals with the same priority."""
        return priority, next(self._arrivals)

    @asynccontextmanager
    async def hold(self, ticket: Ticket) -> AsyncGenerator[None]:
        """Hold the lock. It goes to the waiting task with the smallest ticket."""
        await self._acquire(ticket)
        try:
            yield
        finally:
            # Later, so that a call that has another chunk is back in the queue by then.
            asyncio.get_running_loop().call_soon(self._release)

    async def _acquire(self, ticket: Ticket) -> None:
        if self._is_free_for(ticket):
            self._holders += 1
            return
        granted = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (ticket, next(self._arrivals), granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():  # granted just before the cancellation
                self._release()
            raise

    def _is_free_for(self, ticket: Ticket) -> bool:
        extra = self._extra_queries if ticket[0] == PRIORITY["query"] else 0
        return self._holders < 1 + extra

    def _release(self) -> None:
        self._holders -= 1
        while self._waiting and self._is_free_for(self._waiting[0][0]):
            _, _, granted = heapq.heappop(self._waiting)
            if not granted.done():  # a cancelled one is skipped
                granted.set_result(None)
                self._holders += 1


def chunks(
    texts: Sequence[str], *, max_texts: int, max_tokens: int
) -> Iterator[tuple[int, Sequence[str]]]:
    """Split `texts` into chunks, each with the index of its first text. Only a single text may have
    more than `max_tokens` estimated tokens."""
    start = tokens = 0
    for end, text in enumerate(texts):
        estimate = estimate_tokens(len(text.encode()))
        if end > start and (end - start == max_texts or tokens + estimate > max_tokens):
            yield start, texts[start:end]
            start, tokens = end, 0
        tokens += estimate
    if texts:
        yield start, texts[start:]
