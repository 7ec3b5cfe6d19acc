"""From batches to results: how many requests run at a time, and what happens when one fails.

`_dispatch` is the only implementation. `Dispatcher.run` and `Dispatcher.arun` differ in how they
wait. Requests run on the background event loop (`event_loop`); the caller's iterator and callbacks
run on the caller's thread.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, cast, get_args

from kalm_integrations import tracing
from kalm_integrations.batching import Batch
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import InvalidInputError
from kalm_integrations.event_loop import BackgroundLoop, background_loop, is_exiting
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.native_threads import NativeFuture, new_event
from kalm_integrations.prompts import Role
from kalm_integrations.result import EmbeddedBatch, Usage
from kalm_integrations.session import CallSettings, Session
from kalm_integrations.transports.base import open_transport

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)


class Dispatcher:
    """Sends the batches of one client, from any thread and any event loop.

    The session with its connections belongs to one background loop, and so to one process: after
    a fork there is a new loop and a new session. It closes with this object, or with the process.

    Args:
        config: The client's.
    """

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        # What each call needs of the arguments, computed once.
        self.templates = {role: config.template(role) for role in get_args(Role)}
        self.limits = config.request_limits
        self.dimensions = config.vector_dimensions
        self._loop: BackgroundLoop | None = None
        self._session: Session | None = None

    def run(self, batches: Iterator[Batch], call: CallSettings) -> Generator[EmbeddedBatch]:
        """Send `batches`, and yield their results as they arrive.

        At most `max_concurrency` requests of this call run at a time. A failure ends the reading
        and is raised last, after all results that have arrived. A failed request cancels the
        others, unless it failed because of its texts. An exception of `batches` cancels none: the
        running requests are completed first.

        Args:
            batches: Read on the caller's thread, one for each free slot.
            call: What the requests share.
        """
        completed = new_event()

        def wait() -> bool:
            completed.wait()
            completed.clear()
            return True

        results = self._traced(batches, call, completed.set, wait)
        return cast(Generator[EmbeddedBatch], results)  # `wait` does not return False

    async def arun(
        self, batches: Iterator[Batch], call: CallSettings
    ) -> AsyncGenerator[EmbeddedBatch]:
        """`run`, without blocking the running event loop."""
        loop, completed = asyncio.get_running_loop(), asyncio.Event()
        notify = partial(loop.call_soon_threadsafe, completed.set)
        with closing(self._traced(batches, call, notify, lambda: False)) as results:
            for result in results:
                if result is None:
                    await completed.wait()
                    completed.clear()
                else:
                    yield result

    def ensure_ready(self, timeout: float) -> Future[SpaceIdentity | None]:
        """Wait until the service can embed; the result is its identity, if it reports one."""
        return background_loop().submit(self._ensure_ready(timeout))

    def count_tokens(
        self, batches: list[Batch], call: CallSettings, total: int
    ) -> Future[list[int]]:
        """The tokens of each of `total` texts, one batch after the other."""
        return background_loop().submit(self._count_tokens(batches, call, total))

    def close(self) -> Future[None]:
        """Close the connections. A later call opens new ones."""
        if is_exiting():  # everything is closed already
            closed: Future[None] = NativeFuture()
            closed.set_result(None)
            return closed
        return background_loop().submit(self._close())

    def _traced(
        self,
        batches: Iterator[Batch],
        call: CallSettings,
        notify: Callable[[], object],
        wait: Callable[[], bool],
    ) -> Generator[EmbeddedBatch | None]:
        """`_dispatch`, with a span if a trace is recorded."""
        with tracing.client_span(self._config.served_model) as span:
            results = self._dispatch(batches, call, notify, wait, span)
            if span is None:
                yield from results
                return
            texts, usage = 0, Usage()
            span.set_attributes(_attributes(self._config, call.role))
            try:
                for result in results:
                    if result is not None:
                        texts, usage = texts + len(result.indices), usage + result.usage
                    yield result
            finally:
                results.close()
                span.set_attributes({"kalm.texts": texts, "kalm.requests": usage.requests})
                if usage.tokens is not None:
                    span.set_attribute("gen_ai.usage.input_tokens", usage.tokens)

    def _dispatch(
        self,
        batches: Iterator[Batch],
        call: CallSettings,
        notify: Callable[[], object],
        wait: Callable[[], bool],
        span: Span | None,
    ) -> Generator[EmbeddedBatch | None]:
        """Yield results as they arrive.

        Args:
            batches: See `run`.
            call: See `run`.
            notify: Called on another thread when a request is complete.
            wait: Waits for that and returns True; if False, yield None for the caller to wait.
            span: The current span of the requests.
        """
        running: set[Future[EmbeddedBatch]] = set()
        completed: deque[Future[EmbeddedBatch]] = deque()
        results: list[EmbeddedBatch] = []
        failures: list[BaseException] = []
        batch: Batch | None = None
        reading = True

        def complete(future: Future[EmbeddedBatch]) -> None:
            completed.append(future)
            with suppress(RuntimeError):  # the caller's loop is closed: nobody waits any more
                notify()

        try:
            while reading or running:
                while completed:
                    future = completed.popleft()
                    running.discard(future)
                    failure = CancelledError() if future.cancelled() else future.exception()
                    if failure is None:
                        results.append(future.result())
                        continue
                    failures.append(failure)
                    if not isinstance(failure, InvalidInputError):
                        _cancel(running)
                # Slots that have become free are filled before the caller gets the results. Their
                # number bounds what is read ahead; the session's slots bound all calls together.
                for _ in range(max(1, len(results))):
                    reading = reading and not failures
                    full = len(running) >= self._config.max_concurrency
                    if full or not reading:
                        break
                    try:
                        batch = next(batches, None)
                    except Exception as error:  # noqa: BLE001 (raised after the results)
                        failures.append(error)
                    reading = batch is not None and not failures
                    if batch is not None and reading:
                        with tracing.activated(span):
                            future = background_loop().submit(self.send(batch, call))
                        running.add(future)
                        future.add_done_callback(complete)
                for result in results:
                    self.report_usage(result.usage)
                    yield result
                results.clear()
                if not completed and running and (full or not reading) and not wait():
                    yield None
            if failures:  # the first, but those of some texts only after those of the service
                raise min(failures, key=lambda failure: isinstance(failure, InvalidInputError))
        finally:
            _cancel(running)

    def report_usage(self, usage: Usage) -> None:
        """Call the caller's `on_usage` with the usage of a result."""
        if self._config.on_usage is not None and usage.requests:
            try:
                self._config.on_usage(usage)
            except Exception:  # the caller's accounting must not cost the caller's vectors
                log.exception("on_usage failed")

    async def send(self, batch: Batch, call: CallSettings) -> EmbeddedBatch:
        """Send one batch; on the background loop only."""
        return await self._open().send(batch, call)

    async def _ensure_ready(self, timeout: float) -> SpaceIdentity | None:
        return await self._open().ensure_ready(timeout)

    async def _count_tokens(
        self, batches: list[Batch], call: CallSettings, total: int
    ) -> list[int]:
        counts = [0] * total
        for batch in batches:
            answer = await self._open().count_tokens(batch, call)
            for tokens, positions in zip(answer, batch.positions, strict=True):
                for index in positions:
                    counts[index] = tokens
        return counts

    def _open(self) -> Session:
        """The session; called on the background loop only."""
        loop = background_loop()
        if self._session is None or self._loop is not loop:
            session = Session(self._config, open_transport(self._config))
            self._loop, self._session = loop, session
            loop.resources.add(session)
            self._finalizer = weakref.finalize(self, loop.close_soon, session)
            self._finalizer.atexit = False
        return self._session

    async def _close(self) -> None:
        session, self._session = self._session, None
        loop = background_loop()
        if session is not None and self._loop is loop:
            self._finalizer.detach()  # otherwise every closed session would be kept alive
            loop.resources.discard(session)
            await session.close()


def _attributes(config: ClientConfig, role: Role) -> dict[str, str | int]:
    """The attributes of a call's span that are known before it is sent."""
    attributes: dict[str, str | int] = {"kalm.backend": config.resolved_backend, "kalm.role": role}
    if config.vector_dimensions:
        attributes["gen_ai.embeddings.dimension.count"] = config.vector_dimensions
    if len(config.base_urls) == 1:  # of several, each request has its own
        from yarl import URL

        url = URL(config.base_urls[0])
        attributes |= {"server.address": url.host or "", "server.port": url.port or 0}
    return attributes


def _cancel(futures: Iterable[Future[EmbeddedBatch]]) -> None:
    for future in futures:
        future.cancel()
