"""Requests in flight: how many, which have landed, and what happens when one fails."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress

from kalm_integrations.batching import Batch
from kalm_integrations.errors import InvalidInputError
from kalm_integrations.result import EmbeddedBatch


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
