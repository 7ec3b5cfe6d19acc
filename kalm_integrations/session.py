"""One request's way: slot, deadline, retries, splits, checks. Lives on the I/O thread."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np

from kalm_integrations.batching import Batch
from kalm_integrations.codec import EmbedAnswer, EmbedRequest
from kalm_integrations.errors import (
    DeadlineExceededError,
    InvalidInputError,
    InvalidResponseError,
    InvalidText,
    KalmError,
    RequestTooLargeError,
    TransportError,
)
from kalm_integrations.event_loop import IOThread, io_thread, is_running
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.lane import Lane
from kalm_integrations.options import FIRST_START, ClientConfig
from kalm_integrations.prompts import Role
from kalm_integrations.result import EmbeddedBatch, Usage
from kalm_integrations.retry import RetryBudget, delay_before
from kalm_integrations.transports.base import Transport, open_transport
from kalm_integrations.verify import Verifier

log = logging.getLogger(__name__)

COLD_AFTER = 5.0  # seconds without a first answer, after which a log line says why that may be
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What all requests of one call share.

    Attributes:
        role: Side of the search.
        deadline: On the clock of `time.monotonic`; None gives each request the whole timeout.
        skip_invalid: Embed a request's other texts where some cannot be embedded.
        timeout: Seconds until the deadline when the call began, if not the settings' own.
    """

    role: Role
    deadline: float | None
    skip_invalid: bool = False
    timeout: float | None = None


class Session:
    """A client's connections on one loop, and the slots that bound its requests in flight."""

    def __init__(
        self, settings: ClientConfig, transport: Transport, verifier: Verifier | None = None
    ) -> None:
        self._settings = settings
        self._transport = transport
        self._verifier = verifier or Verifier(settings)
        self._told = self._answered = False
        self._failed: KalmError | None = None
        self._budget = RetryBudget(settings.max_retries * settings.max_concurrency)
        self._slots: dict[Role, asyncio.Semaphore] = {
            "query": asyncio.Semaphore(settings.max_concurrency),
            "document": asyncio.Semaphore(settings.max_concurrency),
        }

    async def send(self, batch: Batch, call: Call) -> EmbeddedBatch:
        """Embed one batch.

        Raises:
            KalmError: Whatever went wrong, always one of these; indices are the caller's.
        """
        if not batch.texts:
            return self._nothing(batch.rejected)

        async def in_slot(deadline: float) -> EmbeddedBatch:
            async with self._slots[call.role]:
                return await self._embed(batch, call, deadline)

        return await self._in_time(in_slot, call)

    def lane(self, owner: object) -> Lane | None:
        """A lane beside this session, whose answers are held against the same identity; None for
        a transport that cannot be used so."""
        if not self._transport.may_rest or self._settings.transport is not None:
            return None
        beside = Session(self._settings, open_transport(self._settings), self._verifier)
        return Lane(beside, owner)

    async def wake(self, call: Call) -> SpaceIdentity | None:
        """Have the service ready, and its identity checked; what it reports, if it does."""

        async def wake(deadline: float) -> SpaceIdentity | None:
            return await self._retrying(self._transport.wake, deadline)

        served = await self._in_time(wake, call)
        for warning in self._transport.service_warnings:
            log.warning("the service reports %s: %s", warning.code, warning.message)
        if served is not None or self._transport.reports_no_identity:
            self._verifier.check_identity(served)
        return served

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def _in_time(self, work: Callable[[float], Awaitable[T]], call: Call) -> T:
        now = time.monotonic()
        limit = call.timeout or self._settings.timeout
        deadline = now + limit if call.deadline is None else call.deadline
        telling = None
        if self._transport.may_be_cold and not self._told:  # else it is only busy
            loop = asyncio.get_running_loop()
            telling = loop.call_later(COLD_AFTER, self._tell_of_cold_start, limit)
        try:
            async with asyncio.timeout(deadline - now) as timer:
                result = await work(deadline)
                # It runs: what takes long from now on is no start.
                self._told = self._answered = True
                return result
        except TimeoutError as error:
            if not timer.expired():
                raise  # a deadline that the service kept
            message = f"no answer within timeout={limit:g} s."
            if self._failed:
                message += f" The last attempt: {self._failed}"
            elif self._transport.may_be_cold and not self._answered:
                message += (
                    " The service may still be starting: a first start takes 5 to 10 minutes, and "
                    f"at most {FIRST_START:g} s by default. {self._where_to_look()} tells the "
                    f"phase; warm_up(timeout={FIRST_START:g}) waits for it."
                )
            raise DeadlineExceededError(message) from error
        finally:
            if telling is not None:
                telling.cancel()

    def _tell_of_cold_start(self, limit: float) -> None:
        if not self._told:
            self._told = True
            log.warning(
                "no answer for %g s: the service may be starting, which can take minutes; waiting "
                "for up to timeout=%g s; %s tells the phase",
                COLD_AFTER,
                limit,
                self._where_to_look(),
            )

    def _where_to_look(self) -> str:
        """Only logs tell the phase: until it has started, a container answers nothing."""
        if self._settings.base_url is None:
            return f"`modal app logs {self._settings.app_name} -f`"
        return "its log (on Modal: `modal app logs APP -f`, with the app's name)"

    async def _embed(self, batch: Batch, call: Call, deadline: float) -> EmbeddedBatch:
        skipped: list[InvalidText] = []
        while batch.texts:
            try:
                part = await self._request(batch, call.role, deadline)
                break
            except RequestTooLargeError as error:
                if len(batch) > 1:
                    halves = [await self._embed(half, call, deadline) for half in batch.halves()]
                    part = _joined(*halves)
                    break
                cause: KalmError = error
                refused = [InvalidText(0, "is too large for the service even alone")]
                rejection: InvalidInputError | InvalidResponseError
                rejection = InvalidInputError.of(batch.locate(refused))
            except (InvalidInputError, InvalidResponseError) as error:
                refused = list(error.invalid)
                if not refused:
                    raise  # the request as a whole
                if not all(0 <= bad.index < len(batch) for bad in refused):
                    raise TransportError(
                        f"the service refused texts it was not sent: {error}"
                    ) from error
                cause = error
                rejection = type(error).of(batch.locate(refused))
            # Of a service that is broken all vectors are wrong: no text is to blame, none is
            # skipped.
            broken = isinstance(cause, InvalidResponseError) and len(refused) == len(batch) > 1
            if broken or not call.skip_invalid:
                raise rejection from cause
            skipped += rejection.invalid
            batch = batch.without(bad.index for bad in refused)
        else:
            return self._nothing(tuple(skipped))
        return _joined(part, self._nothing(tuple(skipped))) if skipped else part

    async def _request(self, batch: Batch, role: Role, deadline: float) -> EmbeddedBatch:
        settings = self._settings

        async def attempt() -> EmbedAnswer:
            request = EmbedRequest(
                texts=batch.texts,
                role=role,
                dimensions=settings.dimensions,
                truncate=settings.truncate,
                dtype=settings.vector_dtype,
                timeout=deadline - time.monotonic(),
            )
            answer = await self._transport.embed(request)
            self._verifier.check_request(answer, request)
            return answer

        answer = await self._retrying(attempt, deadline)
        self._verifier.check(answer, len(batch))
        indices, rows = batch.scatter(answer.vectors)
        return EmbeddedBatch(indices, rows, answer.usage)

    async def _retrying(self, attempt: Callable[[], Awaitable[T]], deadline: float) -> T:
        for retry in itertools.count():
            try:
                result = await attempt()
                self._budget.earn()
                self._failed = None
                return result
            except KalmError as error:
                self._failed = error
                delay = delay_before(retry, error, self._settings.max_retries)
                if delay is None or time.monotonic() + delay >= deadline:
                    raise
                if not self._budget.spend():
                    raise
                log.warning("retry %d in %.1f s: %s", retry + 1, delay, error)
            except Exception as error:
                raise TransportError(f"{type(error).__name__}: {error}.") from error
            await asyncio.sleep(delay)
        raise AssertionError("unreachable")

    def _nothing(self, rejected: tuple[InvalidText, ...]) -> EmbeddedBatch:
        shape = (0, self._settings.vector_dimensions)
        vectors = np.empty(shape, dtype=self._settings.vector_dtype)
        return EmbeddedBatch(np.empty(0, dtype=np.int64), vectors, Usage(), rejected)


class SessionHolder:
    """Where a client keeps its session, and the lane beside it.

    A session belongs to one loop and so to one process: after a fork there is a new loop, and a
    new session with it. It is used on the I/O thread only, the lane by callers. Copies and pickles
    of the holder are empty, and all holders are equal: clients compare by their settings.
    """

    def __init__(self) -> None:
        self._thread: IOThread | None = None
        self._session: Session | None = None
        self._opening = threading.Lock()
        self._lane: Lane | None = None

    def open(self, config: ClientConfig) -> Session:
        thread = io_thread()
        if self._session is None or self._thread is not thread:
            # The thread keeps the session until it is closed; so the session must not keep the
            # client, and with it this holder, whose end closes the session.
            self._thread, self._session = thread, Session(config, open_transport(config))
            thread.resources.add(self._session)
            self._end = weakref.finalize(self, _close_later, thread, self._session)
            self._end.atexit = False
        return self._session

    def send_by_lane(self, batch: Batch, call: Call) -> EmbeddedBatch | None:
        """`Session.send`, on the caller's thread; None where it has to be the I/O thread, which it
        is before anything was sent."""
        lane = self._lane
        if lane is None or lane.closed:
            lane = self._open_lane()
        return None if lane is None else lane.send(batch, call)

    async def close(self) -> None:
        session, self._session = self._session, None
        lane, self._lane = self._lane, None
        if session is not None and self._thread is io_thread():
            self._end.detach()  # or every closed session would be kept
            self._thread.resources.discard(session)
            await session.close()
        if lane is not None:
            await asyncio.wrap_future(lane.close())

    def _open_lane(self) -> Lane | None:
        session = self._session
        # The lock may be a parent process's, and never be released.
        if session is None or self._thread is None or not is_running(self._thread):
            return None
        if not self._opening.acquire(blocking=False):
            return None
        try:
            self._lane = session.lane(self)
            return self._lane
        except OSError:  # too many open files: the I/O thread has its loop already
            return None
        finally:
            self._opening.release()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SessionHolder)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


def _close_later(thread: IOThread, session: Session) -> None:
    if is_running(thread):
        thread.discard(session)


def _joined(first: EmbeddedBatch, second: EmbeddedBatch) -> EmbeddedBatch:
    # What has no rows may not know the dimensions either.
    rows = [part.packed for part in (first, second) if len(part)] or [first.packed]
    return EmbeddedBatch(
        np.concatenate([first.indices, second.indices]),
        np.concatenate(rows),
        first.usage + second.usage,
        first.rejected + second.rejected,
    )
