"""A lock that is granted by priority: queries first, then in order of arrival.

A call that is computed in several chunks releases the lock between them, so that a query can go
first. It keeps its place in the queue, so that calls of one priority finish one after the other.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from kalm_integrations.batching import estimate_tokens
from kalm_integrations.prompts import Role

PRIORITY: Final[dict[Role, int]] = {"query": 0, "document": 1}
"""The smaller number goes first."""

Place = tuple[int, int]


class PriorityLock:
    """A lock for the tasks of one event loop.

    Args:
        queries_ahead: How many queries may hold it besides, so that the next one is at hand when
            the engine is free. The event loop may be busy then.
    """

    def __init__(self, queries_ahead: int = 0) -> None:
        self._queries_ahead = queries_ahead
        self._held = 0
        self._waiting: list[tuple[Place, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    def place(self, priority: int) -> Place:
        """A new place in the queue: before every larger `priority`, after earlier arrivals."""
        return priority, next(self._arrivals)

    @asynccontextmanager
    async def hold(self, place: Place) -> AsyncGenerator[None]:
        """Hold the lock. Of the waiting tasks, the one with the smallest `place` gets it next."""
        await self._acquire(place)
        try:
            yield
        finally:
            # Not at once: a call that has another chunk must be back in the queue by then.
            asyncio.get_running_loop().call_soon(self._release)

    async def _acquire(self, place: Place) -> None:
        if self._is_free_for(place):
            self._held += 1
            return
        granted = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (place, next(self._arrivals), granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():  # granted to a task that has ended
                self._release()
            raise

    def _is_free_for(self, place: Place) -> bool:
        ahead = self._queries_ahead if place[0] == PRIORITY["query"] else 0
        return self._held < 1 + ahead

    def _release(self) -> None:
        self._held -= 1
        while self._waiting and self._is_free_for(self._waiting[0][0]):
            _, _, waiter = heapq.heappop(self._waiting)
            if not waiter.done():  # a cancelled one is skipped
                waiter.set_result(None)
                self._held += 1


def chunks(
    texts: Sequence[str], *, max_texts: int, max_tokens: int
) -> Iterator[tuple[int, Sequence[str]]]:
    """Split `texts` into what is computed in one go, which is what a query may have to wait for.

    Args:
        texts: The texts of one call.
        max_texts: Most texts in a chunk.
        max_tokens: Most estimated tokens in a chunk; a single text may have more.

    Yields:
        Each chunk, with the index of its first text.
    """
    start = tokens = 0
    for end, text in enumerate(texts):
        more = estimate_tokens(len(text.encode()))
        if end > start and (end - start == max_texts or tokens + more > max_tokens):
            yield start, texts[start:end]
            start, tokens = end, 0
        tokens += more
    if texts:
        yield start, texts[start:]
