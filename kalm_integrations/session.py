"""One request: concurrency slot, deadline, retries, splitting, validation.

Each role has slots of its own, so that a query does not wait for documents. The retry policy is in
`retry`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

import numpy as np

from kalm_integrations import tracing
from kalm_integrations.batching import Batch
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import (
    ConfigurationError,
    DeadlineExceededError,
    InvalidInputError,
    InvalidResponseError,
    InvalidText,
    KalmError,
    RequestTooLargeError,
    TransportError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.options import STARTUP_TIMEOUT
from kalm_integrations.prompts import Role
from kalm_integrations.protocol import EmbedRequest, EmbedResponse
from kalm_integrations.response_validator import ResponseValidator
from kalm_integrations.result import EmbeddedBatch, Usage
from kalm_integrations.retry import RetryPolicy
from kalm_integrations.transports.base import Transport

log = logging.getLogger(__name__)
T = TypeVar("T")

COLD_START_HINT = 5.0  # seconds without a first response, until the log mentions a cold start


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSettings:
    """What all requests of one call share.

    Attributes:
        role: Chooses the slots, and the priority in the service.
        timeout: Seconds for the call; for each request if `deadline` is None.
        deadline: When the call ends, a time of `time.monotonic`; None if each request has its own.
        skip_invalid: Embed a request's other texts if some cannot be embedded.
    """

    role: Role
    timeout: float
    deadline: float | None = None
    skip_invalid: bool = False


@dataclass(slots=True)
class _RequestState:
    """When a request must be complete (`time.monotonic`), how often it was retried, how often of
    these outside outages, and what its last attempt failed with."""

    deadline: float
    retries: int = 0
    counted: int = 0
    last_failure: KalmError | None = None


class Session:
    """A client's connections on one event loop, and the slots that bound its concurrency."""

    def __init__(self, config: ClientConfig, transport: Transport) -> None:
        self._config = config
        self._transport = transport
        self._validator = ResponseValidator(config)
        self._retries = RetryPolicy(config.max_retries, config.max_concurrency)
        # They bound the requests of all calls; the dispatcher bounds those of one.
        self._slots: dict[Role, asyncio.Semaphore] = {
            "query": asyncio.Semaphore(config.max_concurrency),
            "document": asyncio.Semaphore(config.max_concurrency),
        }
        self._may_be_cold = transport.can_be_cold
        """False after the first success: what takes long from then on is no cold start."""
        self._hinted = False

    async def send(self, batch: Batch, call: CallSettings) -> EmbeddedBatch:
        """Embed one batch; split it if it is too large; leave out invalid texts if `skip_invalid`.

        Raises:
            KalmError: Always one of these, whatever went wrong; indices are the caller's.
        """
        if not batch.texts:
            return self._without_vectors(batch.rejected)
        parts: list[EmbeddedBatch] = []
        pending = [batch]
        limit = self._deadline(call.timeout, call.deadline)
        async with limit as state, self._slots[call.role]:
            while pending:
                batch = pending.pop()
                try:
                    parts.append(await self._embed(batch, call.role, state))
                except RequestTooLargeError:
                    pending += reversed(batch.halves())
                except (InvalidInputError, InvalidResponseError) as error:
                    located = _with_callers_indices(error, batch)
                    if not call.skip_invalid or _is_broken(error, batch):
                        raise located from error
                    parts.append(self._without_vectors(located.invalid))
                    rest = batch.without(each.index for each in error.invalid)
                    if rest.texts:
                        pending.append(rest)
        return reduce(EmbeddedBatch.joined, parts)

    async def ensure_ready(self, timeout: float) -> SpaceIdentity | None:
        """Wait until the service can embed, and check its identity; None if it reports none."""
        async with self._deadline(timeout) as state:
            while True:
                began = time.monotonic()
                try:
                    description = await self._transport.ensure_ready()
                    break
                except Exception as error:  # noqa: BLE001 (raised again, or logged)
                    await self._before_retry(error, state, began)
        if description is None:
            return None
        for warning in description.warnings:
            log.warning("the service reports %s: %s", warning.code, warning.message)
        self._validator.check_identity(description.identity)
        return description.identity

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def count_tokens(self, batch: Batch, call: CallSettings) -> list[int]:
        """The tokens of each text of a batch.

        Raises:
            KalmError: As `send`; the transport or the server may not be able to count.
        """
        count = getattr(self._transport, "count_tokens", None)
        if count is None:
            name = type(self._transport).__name__
            raise ConfigurationError(f"{name} has no count_tokens, so tokens cannot be counted.")
        async with self._deadline(call.timeout, call.deadline) as state, self._slots[call.role]:
            try:
                counts: list[int] = await self._retrying(count, batch, call.role, state)
            except InvalidInputError as error:
                raise _with_callers_indices(error, batch) from error
        if len(counts) != len(batch) or not all(type(each) is int for each in counts):
            raise InvalidResponseError(f"the response has no count for each of {len(batch)} texts.")
        return counts

    async def _embed(self, batch: Batch, role: Role, state: _RequestState) -> EmbeddedBatch:
        """Send one request, and check the response."""

        async def attempt(request: EmbedRequest) -> EmbedResponse:
            response = await self._transport.embed(request)
            self._validator.check(response, request)
            return response

        response = await self._retrying(attempt, batch, role, state)
        truncated = () if self._config.truncate == "error" else response.truncated
        return batch.scatter(response.vectors, response.usage, truncated)

    async def _retrying(
        self,
        attempt: Callable[[EmbedRequest], Awaitable[T]],
        batch: Batch,
        role: Role,
        state: _RequestState,
    ) -> T:
        """The result of `attempt`, which is repeated as `RetryPolicy` decides."""
        state.retries = state.counted = 0
        while True:
            began = time.monotonic()
            request = EmbedRequest(
                texts=batch.texts,
                role=role,
                dimensions=self._config.dimensions,
                truncate=self._config.truncate,
                dtype=self._config.vector_dtype,
                timeout=state.deadline - time.monotonic(),
            )
            try:
                result = await attempt(request)
            except Exception as error:
                if isinstance(error, RequestTooLargeError) and len(batch) == 1:
                    alone = InvalidText(0, "is too large for the service even alone")
                    raise InvalidInputError.of([alone]) from error
                await self._before_retry(error, state, began)
            else:
                self._retries.succeeded(began)
                state.last_failure = None  # what follows is another half of the batch
                return result

    async def _before_retry(self, error: Exception, state: _RequestState, began: float) -> None:
        """Wait until the request may be sent again; raise `error` if it may not."""
        if not isinstance(error, KalmError):
            raise TransportError(f"{type(error).__name__}: {error}.") from error
        state.last_failure = error
        outage = self._retries.is_outage(error, began)
        time_left = state.deadline - time.monotonic()
        delay = self._retries.delay(state.counted, error, time_left, outage=outage)
        if delay is None:
            failure = copy(error)  # several calls may share it, and each adds what it has embedded
            failure.retries = state.retries
            raise failure.with_traceback(error.__traceback__) from error.__cause__
        state.retries += 1
        state.counted += not outage
        log.debug("retry %d in %.1f s: %s", state.retries, delay, error)
        if span := tracing.current_span():
            kind = tracing.error_type(error)
            span.add_event("retry", {"error.type": kind, "kalm.retry.delay": delay})
        await asyncio.sleep(delay)

    @asynccontextmanager
    async def _deadline(
        self, timeout: float, deadline: float | None = None
    ) -> AsyncIterator[_RequestState]:
        """Yield the state of a request; raise `DeadlineExceededError` at its deadline, which is
        `timeout` seconds from now if `deadline` is None."""
        now = time.monotonic()
        state = _RequestState(now + timeout if deadline is None else deadline)
        hint = None
        if self._may_be_cold and not self._hinted:
            loop = asyncio.get_running_loop()
            hint = loop.call_later(COLD_START_HINT, self._log_cold_start, timeout)
        try:
            async with asyncio.timeout(state.deadline - now) as timer:
                yield state
            self._may_be_cold = False
        except TimeoutError as error:
            if not timer.expired():
                raise  # the transport or the service has raised it
            message = f"no response within timeout={timeout:g} s."
            if state.last_failure:
                message += f" The last attempt: {state.last_failure}"
            elif self._may_be_cold:
                message += (
                    " The service may still be starting: a first start takes 5 to 10 minutes, and "
                    f"at most {STARTUP_TIMEOUT:g} s by default. {self._log_location()} shows the "
                    f"phase; warm_up(timeout={STARTUP_TIMEOUT:g}) waits for it."
                )
            raise DeadlineExceededError(message) from error
        finally:
            if hint is not None:
                hint.cancel()

    def _log_cold_start(self, timeout: float) -> None:
        if self._may_be_cold and not self._hinted:
            self._hinted = True
            log.warning(
                "no response for %g s: the service may be starting, which can take minutes; "
                "waiting for up to timeout=%g s; %s shows the phase",
                COLD_START_HINT,
                timeout,
                self._log_location(),
            )

    def _log_location(self) -> str:
        """Where the phase of a start is logged: a container that starts responds to nothing."""
        if self._config.base_url is None:
            return f"`modal app logs {self._config.app_name} -f`"
        return "its log (on Modal: `modal app logs APP -f`, with the app's name)"

    def _without_vectors(self, rejected: tuple[InvalidText, ...]) -> EmbeddedBatch:
        shape = (0, self._config.vector_dimensions)
        vectors = np.empty(shape, dtype=self._config.vector_dtype)
        return EmbeddedBatch(np.empty(0, dtype=np.int64), vectors, Usage(), rejected)


def _is_broken(error: InvalidInputError | InvalidResponseError, batch: Batch) -> bool:
    """Whether all of several vectors are wrong: then the service is broken, not the texts."""
    return type(error) is InvalidResponseError and len(error.invalid) == len(batch) > 1


def _with_callers_indices(
    error: InvalidInputError | InvalidResponseError, batch: Batch
) -> InvalidInputError | InvalidResponseError:
    """`error` of a request, with the caller's indices.

    Raises:
        KalmError: It concerns the request as a whole, or texts that are not in it.
    """
    if not error.invalid:
        raise error
    if not all(0 <= each.index < len(batch) for each in error.invalid):
        raise TransportError(
            f"the service rejected texts that were not in the request: {error}"
        ) from error
    return error.of(batch.locate(error.invalid))
