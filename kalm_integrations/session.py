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
from dataclasses import dataclass
from functools import partial, reduce
from itertools import count
from typing import TypeVar

import numpy as np

from kalm_integrations.batching import Batch
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import (
    DeadlineExceededError,
    InvalidInputError,
    InvalidResponseError,
    InvalidText,
    KalmError,
    RequestTooLargeError,
    TransportError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.options import FIRST_START
from kalm_integrations.prompts import Role
from kalm_integrations.protocol import EmbedRequest, EmbedResponse
from kalm_integrations.result import EmbeddedBatch, Usage
from kalm_integrations.retry import RetryPolicy
from kalm_integrations.transports.base import Transport
from kalm_integrations.validation import ResponseValidator

log = logging.getLogger(__name__)

COLD_START_HINT = 5.0  # seconds without a first response, until the log mentions a cold start
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What all requests of one call share.

    Attributes:
        role: Side of the search.
        timeout: Seconds for the call; for each request if `deadline` is None.
        deadline: On the clock of `time.monotonic`.
        skip_invalid: Embed a request's other texts if some cannot be embedded.
    """

    role: Role
    timeout: float
    deadline: float | None = None
    skip_invalid: bool = False


class Session:
    """A client's connections on one event loop, and the slots that bound its concurrency."""

    def __init__(self, config: ClientConfig, transport: Transport) -> None:
        self._config = config
        self._transport = transport
        self._validator = ResponseValidator(config)
        self._retries = RetryPolicy(config.max_retries, config.max_concurrency)
        self._last_failure: KalmError | None = None
        self._slots: dict[Role, asyncio.Semaphore] = {
            "query": asyncio.Semaphore(config.max_concurrency),
            "document": asyncio.Semaphore(config.max_concurrency),
        }
        self._may_be_cold = transport.can_be_cold
        """False after the first response: what takes long from then on is no cold start."""
        self._hinted = False

    async def send(self, batch: Batch, call: Call) -> EmbeddedBatch:
        """Embed one batch. Split it if it is too large; leave out invalid texts if they may be.

        Raises:
            KalmError: Always one of these, whatever went wrong; indices are the caller's.
        """
        if not batch.texts:
            return self._without_vectors(batch.rejected)
        parts: list[EmbeddedBatch] = []
        pending = [batch]
        async with self._deadline(call) as deadline, self._slots[call.role]:
            while pending:
                batch = pending.pop()
                try:
                    attempt = partial(self._attempt, batch.texts, call, deadline)
                    response = await self._retry(attempt, deadline)
                    parts.append(EmbeddedBatch(*batch.scatter(response.vectors), response.usage))
                except RequestTooLargeError:
                    pending += reversed(batch.halves())
                except (InvalidInputError, InvalidResponseError) as error:
                    rejection = _rejection(batch, error)
                    # If all of several vectors are wrong, the service is broken, not the texts.
                    broken = (
                        type(error) is InvalidResponseError and len(error.invalid) == len(batch) > 1
                    )
                    if broken or not call.skip_invalid:
                        raise rejection from error
                    parts.append(self._without_vectors(rejection.invalid))
                    rest = batch.without(each.index for each in error.invalid)
                    pending += [rest] if rest.texts else []
        return reduce(EmbeddedBatch.joined, parts)

    async def ensure_ready(self, call: Call) -> SpaceIdentity | None:
        """Wait until the service can embed, and check its identity; None if it reports none."""
        async with self._deadline(call) as deadline:
            description = await self._retry(self._transport.ensure_ready, deadline)
        if description is None:
            return None
        for warning in description.warnings:
            log.warning("the service reports %s: %s", warning.code, warning.message)
        self._validator.check_identity(description.identity)
        return description.identity

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def _retry(self, attempt: Callable[[], Awaitable[T]], deadline: float) -> T:
        """The result of `attempt`, retried as `RetryPolicy` decides."""
        for retry in count():
            try:
                result = await attempt()
            except KalmError as error:
                self._last_failure = error
                delay = self._retries.delay(retry, error, deadline - time.monotonic())
                if delay is None:
                    raise
                log.warning("retry %d in %.1f s: %s", retry + 1, delay, error)
            except Exception as error:
                raise TransportError(f"{type(error).__name__}: {error}.") from error
            else:
                self._retries.succeeded()
                self._last_failure = None
                return result
            await asyncio.sleep(delay)
        raise AssertionError("unreachable")

    async def _attempt(self, texts: list[str], call: Call, deadline: float) -> EmbedResponse:
        """Send one request, once, and check the response."""
        request = EmbedRequest(
            texts=texts,
            role=call.role,
            dimensions=self._config.dimensions,
            truncate=self._config.truncate,
            dtype=self._config.vector_dtype,
            timeout=deadline - time.monotonic(),
        )
        try:
            response = await self._transport.embed(request)
        except RequestTooLargeError as error:
            if len(texts) > 1:
                raise
            alone = InvalidText(0, "is too large for the service even alone")
            raise InvalidInputError.of([alone]) from error
        self._validator.check(response, request)
        return response

    @asynccontextmanager
    async def _deadline(self, call: Call) -> AsyncIterator[float]:
        """Yield the deadline of a request; raise `DeadlineExceededError` when it has passed."""
        now = time.monotonic()
        deadline = now + call.timeout if call.deadline is None else call.deadline
        hint = None
        if self._may_be_cold and not self._hinted:
            loop = asyncio.get_running_loop()
            hint = loop.call_later(COLD_START_HINT, self._log_cold_start, call.timeout)
        try:
            async with asyncio.timeout(deadline - now) as timer:
                yield deadline
            self._may_be_cold = False
        except TimeoutError as error:
            if not timer.expired():
                raise  # the service's own deadline
            message = f"no response within timeout={call.timeout:g} s."
            if self._last_failure:
                message += f" The last attempt: {self._last_failure}"
            elif self._may_be_cold:
                message += (
                    " The service may still be starting: a first start takes 5 to 10 minutes, and "
                    f"at most {FIRST_START:g} s by default. {self._log_location()} shows the "
                    f"phase; warm_up(timeout={FIRST_START:g}) waits for it."
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


def _rejection(
    batch: Batch, error: InvalidInputError | InvalidResponseError
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
