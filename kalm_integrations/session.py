"""One request: concurrency slot, deadline, retries, splitting, validation.

A session holds one client's connections. It lives on one event loop; `dispatch` hands it batches.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
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
from kalm_integrations.retry import RetryBudget, delay_before
from kalm_integrations.transports.base import Transport
from kalm_integrations.validation import ResponseValidator

log = logging.getLogger(__name__)

COLD_START_HINT = 5.0  # seconds without a first response, after which the log names a cold start
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
        self._ready = False
        """Whether the service has responded once: what takes long afterwards is no cold start."""
        self._hinted = False
        self._last_failure: KalmError | None = None
        self._budget = RetryBudget(config.max_retries * config.max_concurrency)
        self._slots: dict[Role, asyncio.Semaphore] = {
            "query": asyncio.Semaphore(config.max_concurrency),
            "document": asyncio.Semaphore(config.max_concurrency),
        }

    async def send(self, batch: Batch, call: Call) -> EmbeddedBatch:
        """Embed one batch.

        Raises:
            KalmError: Always one of these, whatever went wrong; indices are the caller's.
        """
        if not batch.texts:
            return self._without_vectors(batch.rejected)
        async with self._deadline(call) as deadline, self._slots[call.role]:
            return await self._embed(batch, call, deadline)

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

    @asynccontextmanager
    async def _deadline(self, call: Call) -> AsyncIterator[float]:
        """Yield the deadline of a request; raise `DeadlineExceededError` when it has passed."""
        now = time.monotonic()
        deadline = now + call.timeout if call.deadline is None else call.deadline
        hint = None
        if self._transport.can_be_cold and not (self._ready or self._hinted):
            loop = asyncio.get_running_loop()
            hint = loop.call_later(COLD_START_HINT, self._log_cold_start, call.timeout)
        try:
            async with asyncio.timeout(deadline - now) as timer:
                yield deadline
            self._ready = True
        except TimeoutError as error:
            if not timer.expired():
                raise  # the service's own deadline
            message = f"no response within timeout={call.timeout:g} s."
            if self._last_failure:
                message += f" The last attempt: {self._last_failure}"
            elif self._transport.can_be_cold and not self._ready:
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
        if self._ready or self._hinted:
            return
        self._hinted = True
        log.warning(
            "no response for %g s: the service may be starting, which can take minutes; waiting "
            "for up to timeout=%g s; %s shows the phase",
            COLD_START_HINT,
            timeout,
            self._log_location(),
        )

    def _log_location(self) -> str:
        """Where the phase of a start can be seen: a container that starts responds to nothing."""
        if self._config.base_url is None:
            return f"`modal app logs {self._config.app_name} -f`"
        return "its log (on Modal: `modal app logs APP -f`, with the app's name)"

    async def _embed(self, batch: Batch, call: Call, deadline: float) -> EmbeddedBatch:
        """Embed `batch`: split if it is too large, without invalid texts if they may be skipped."""

        async def attempt() -> EmbedResponse:
            request = EmbedRequest(
                texts=batch.texts,
                role=call.role,
                dimensions=self._config.dimensions,
                truncate=self._config.truncate,
                dtype=self._config.vector_dtype,
                timeout=deadline - time.monotonic(),
            )
            response = await self._transport.embed(request)
            self._validator.check(response, request)
            return response

        kind: type[InvalidInputError | InvalidResponseError]
        invalid: Sequence[InvalidText]
        cause: KalmError
        rejected: tuple[InvalidText, ...] = ()
        while batch.texts:
            try:
                response = await self._retry(attempt, deadline)
                indices, rows = batch.scatter(response.vectors)
                return EmbeddedBatch(indices, rows, response.usage, rejected)
            except RequestTooLargeError as error:
                if len(batch) > 1:
                    first, second = batch.halves()
                    part = await self._embed(first, call, deadline)
                    part = part.joined(await self._embed(second, call, deadline))
                    return part.joined(self._without_vectors(rejected))
                invalid = [InvalidText(0, "is too large for the service even alone")]
                kind, cause = InvalidInputError, error
            except (InvalidInputError, InvalidResponseError) as error:
                if not error.invalid:
                    raise  # the request as a whole
                if not all(0 <= each.index < len(batch) for each in error.invalid):
                    raise TransportError(
                        f"the service rejected texts that were not in the request: {error}"
                    ) from error
                invalid, kind, cause = error.invalid, type(error), error
            rejection = kind.of(batch.locate(invalid))
            # If all of several vectors are wrong, the service is broken, and no text is to blame.
            broken = kind is InvalidResponseError and len(invalid) == len(batch) > 1
            if broken or not call.skip_invalid:
                raise rejection from cause
            rejected += rejection.invalid
            batch = batch.without(each.index for each in invalid)
        return self._without_vectors(rejected)

    async def _retry(self, attempt: Callable[[], Awaitable[T]], deadline: float) -> T:
        """The result of `attempt`, retried as `retry.delay_before` decides."""
        for retry in itertools.count():
            try:
                result = await attempt()
            except KalmError as error:
                self._last_failure = error
                delay = delay_before(retry, error, self._config.max_retries)
                if delay is None or time.monotonic() + delay >= deadline:
                    raise
                if not self._budget.spend():
                    raise
                log.warning("retry %d in %.1f s: %s", retry + 1, delay, error)
            except Exception as error:
                raise TransportError(f"{type(error).__name__}: {error}.") from error
            else:
                self._budget.earn()
                self._last_failure = None
                return result
            await asyncio.sleep(delay)
        raise AssertionError("unreachable")

    def _without_vectors(self, rejected: tuple[InvalidText, ...]) -> EmbeddedBatch:
        shape = (0, self._config.vector_dimensions)
        vectors = np.empty(shape, dtype=self._config.vector_dtype)
        return EmbeddedBatch(np.empty(0, dtype=np.int64), vectors, Usage(), rejected)
