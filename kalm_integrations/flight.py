"""Requests in flight: how many, which have landed, and what happens when one fails."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress

from kalm_integrations.batching import Batch
from kalm_integrations.errors import InvalidInputError
from kalm_integrations.result import EmbeddedBatch

Launch = Callable[[Batch], Future[EmbeddedBatch]]
"""Sends a request."""
Report = Callable[[EmbeddedBatch], object]


def fly(
    batches: Iterator[Batch], launch: Launch, limit: int, report: Report, busy: Callable[[], bool]
) -> Generator[EmbeddedBatch]:
    """Launch `batches`, at most `limit` at a time; what has landed, as it comes.

    What is handed out is reported first. No further batch is read while the caller is `busy`.
    What is in flight when the caller goes is cancelled.
    """
    landed = threading.Event()
    flight = Flight(limit, landed.set)
    ready: list[EmbeddedBatch] = []
    try:
        for batch in flight.read(batches):
            flight.launch(launch(batch))
            ready += flight.take()
            # What has come is handed out while all slots are taken: no slot waits for it.
            while flight.full or (flight.flying and busy()):
                if not ready:
                    landed.wait()
                    landed.clear()
                parts, ready = ready, []
                yield from _reported(parts, report)
                ready += flight.take()
        yield from _reported(ready, report)
        while flight.flying:
            landed.wait()
            landed.clear()
            yield from _reported(flight.take(), report)
        flight.finish()
    finally:
        flight.cancel()


async def afly(
    batches: Iterator[Batch], launch: Launch, limit: int, report: Report
) -> AsyncGenerator[EmbeddedBatch]:
    """`fly`, for a caller on a running loop."""
    loop, landed = asyncio.get_running_loop(), asyncio.Event()
    flight = Flight(limit, lambda: loop.call_soon_threadsafe(landed.set))
    ready: list[EmbeddedBatch] = []
    try:
        for batch in flight.read(batches):
            flight.launch(launch(batch))
            ready += flight.take()
            while flight.full:
                if not ready:
                    await landed.wait()
                    landed.clear()
                parts, ready = ready, []
                for part in _reported(parts, report):
                    yield part
                ready += flight.take()
        for part in _reported(ready, report):
            yield part
        while flight.flying:
            await landed.wait()
            landed.clear()
            for part in _reported(flight.take(), report):
                yield part
        flight.finish()
    finally:
        flight.cancel()


def _reported(parts: Iterable[EmbeddedBatch], report: Report) -> Iterator[EmbeddedBatch]:
    """`parts`, each reported as it is handed out."""
    for part in parts:
        report(part)
        yield part


class Flight:
    """The requests of one call, driven from the caller's side.

    After a failure no further batch is read. Texts that cannot be embedded concern no other
    request, so that those in flight still land; any other failure cancels them. The failure is
    raised last, after everything that landed was handed out.

    Args:
        limit: Most requests in flight.
        wake: Called from any thread when a request has landed.
    """

    def __init__(self, limit: int, wake: Callable[[], object]) -> None:
        self._limit = limit
        self._wake = wake
        self._flying: set[Future[EmbeddedBatch]] = set()
        self._landed: deque[Future[EmbeddedBatch]] = deque()
        self._failure: BaseException | None = None

    @property
    def flying(self) -> bool:
        """Whether there is something to wait for."""
        return bool(self._flying)

    @property
    def full(self) -> bool:
        """Whether to wait before the next batch is launched."""
        return len(self._flying) >= self._limit

    def read(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """`batches`, until they end or something fails, their own reading included."""
        while self._failure is None:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:  # noqa: BLE001 (raised by finish)
                self._failure = error
                return
            yield batch

    def launch(self, future: Future[EmbeddedBatch]) -> None:
        """Watch a request that was just sent."""
        self._flying.add(future)
        future.add_done_callback(self._land)

    def take(self) -> Iterator[EmbeddedBatch]:
        """What has landed since the last time."""
        while self._landed:
            future = self._landed.popleft()
            self._flying.discard(future)
            error = CancelledError() if future.cancelled() else future.exception()
            if error is None:
                yield future.result()
            else:
                self._fail(error)

    def finish(self) -> None:
        """Raise what failed, if something did."""
        if self._failure is not None:
            raise self._failure

    def cancel(self) -> None:
        """Cancel what is still in flight."""
        for future in list(self._flying):
            future.cancel()

    def _fail(self, error: BaseException) -> None:
        concerns_all = not isinstance(error, InvalidInputError)
        graver = concerns_all and isinstance(self._failure, InvalidInputError)
        if self._failure is None or graver:
            self._failure = error
        if concerns_all:
            self.cancel()

    def _land(self, future: Future[EmbeddedBatch]) -> None:
        self._landed.append(future)
        with suppress(RuntimeError):  # the caller's loop was closed: nobody waits any more
            self._wake()
