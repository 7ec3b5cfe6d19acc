"""`EmbeddingService`: answers the requests of all endpoints with one engine."""

from __future__ import annotations

import asyncio
import time
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from kalm_integrations import tracing
from kalm_integrations.errors import (
    ConfigurationError,
    DeadlineExceededError,
    InvalidResponseError,
    InvalidText,
    KalmError,
    RequestTooLargeError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.prompts import Role
from kalm_integrations.protocol import EmbedRequest, EmbedResponse, ServiceWarning, Vectors
from kalm_integrations.result import Usage
from kalm_integrations.validation import MAX_CHARACTERS, check_texts, invalid_rows
from modal_backend.admission import Admission
from modal_backend.engines.base import Engine, EngineOutput, Progress, check_shape, within
from modal_backend.engines.failed import FailedEngine

if TYPE_CHECKING:
    from opentelemetry.trace import Span

MAX_TEXTS: Final = 2048
"""Most texts in a request, as in OpenAI's API."""
MAX_QUERY_CHARACTERS: Final = 8192
"""Most characters of a request that goes before documents."""
_ROWS_AT_ONCE: Final = 16
_LOOP_CHARACTERS: Final = 65_536
"""Longer requests are checked in a thread, so that the event loop does not stall."""


class EmbeddingService:
    """Validates requests, admits them, and validates the vectors of the engine.

    Args:
        engine: The loaded engine.
        admission: Admission control; by default one with the default limits.
    """

    def __init__(self, engine: Engine, admission: Admission | None = None) -> None:
        self.engine = engine
        """Replaced when its container finds that it is defective."""
        self.admission = admission or Admission()
        self.warnings: tuple[ServiceWarning, ...] = ()
        """Problems that an operator has to fix; reported by every endpoint."""
        self._counting = asyncio.Lock()

    @property
    def failure(self) -> KalmError | None:
        """Why no vectors are served; None if they are."""
        return self.engine.failure if isinstance(self.engine, FailedEngine) else None

    @property
    def identity(self) -> SpaceIdentity:
        """The space of the engine's vectors."""
        return self.engine.identity

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The dimensions that a request may have, the native number first."""
        return self.engine.dimensions

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest text."""
        return self.engine.max_tokens

    @property
    def query_template(self) -> str:
        """The model's own template for queries."""
        return self.engine.query_template

    def check_admission(self, request: EmbedRequest, received: float) -> None:
        """Refuse a request that `embed` would refuse because of overload, at a lower cost.

        Args:
            request: The request.
            received: See `embed`.

        Raises:
            DeadlineExceededError: `request.timeout` passed.
            ServiceUnavailableError: It would not finish in time. It has the time after which to
                retry.
        """
        if self.admission.refusing:
            role, deadline = _scheduled_role(request), _deadline(request, received)
            self.admission.check(role, request.texts, deadline)

    async def embed(self, request: EmbedRequest, received: float | None = None) -> EmbedResponse:
        """Embed the texts of a request.

        Args:
            request: The request.
            received: The time of `time.monotonic` from which `request.timeout` counts; by default
                now.

        Raises:
            InvalidInputError: Texts that cannot be embedded, by index within the request.
            ConfigurationError: The engine does not have these dimensions.
            RequestTooLargeError: Over `MAX_TEXTS` texts.
            DeadlineExceededError: `request.timeout` passed, or will before all is embedded.
            ServiceUnavailableError: It was not admitted: too much is queued for it to finish in
                time.
            InvalidResponseError: The engine returned invalid vectors, or too few; none is returned.
            KalmError: `failure`, if there is one.
        """
        deadline = self._checked_deadline(request, received)
        if request.dimensions not in (None, *self.engine.dimensions):
            offered = ", ".join(map(str, self.engine.dimensions))
            raise ConfigurationError(
                f"dimensions={request.dimensions}: {self.identity.model} has {offered}."
            )
        role = _scheduled_role(request)
        texts, digest, cut_here = await _prepared(request)
        request = replace(request, texts=texts)  # truncated parts need not stay in memory
        output = await self._compute(request, role, deadline)
        check_shape(output.vectors, (len(texts), self.engine.dimensions[0]))
        dimensions = request.dimensions or self.engine.dimensions[0]
        vectors: Vectors = output.vectors
        convert = vectors.shape[1] != dimensions or vectors.dtype != request.dtype
        if convert:
            vectors = np.empty((len(texts), dimensions), dtype=request.dtype)
        invalid: list[InvalidText] = []
        for start in range(0, len(texts), _ROWS_AT_ONCE):
            if start:
                await asyncio.sleep(0)  # other requests run in between
            rows = output.vectors[start : start + _ROWS_AT_ONCE]
            errors = invalid_rows(rows)  # most HTTP callers check nothing
            if not errors and rows.shape[1] != dimensions:
                rows = _shortened(rows, dimensions)
                errors = invalid_rows(rows)
            invalid += [replace(error, index=start + error.index) for error in errors]
            if convert and not invalid:
                # Not checked after rounding to float16: it is within the tolerance, and the client
                # checks what it gets.
                vectors[start : start + len(rows)] = rows
        if invalid:
            raise InvalidResponseError.of(invalid)
        return EmbedResponse(
            vectors=vectors,
            identity=self.identity,
            usage=Usage(tokens=output.tokens, requests=1),
            digest=digest,
            truncated=tuple(sorted({*cut_here, *output.truncated})),
        )

    async def _compute(
        self, request: EmbedRequest, role: Role, deadline: float | None
    ) -> EngineOutput:
        """The engine's output for a request, which is recorded in the current span."""
        span = tracing.current_span()
        if span:
            span.set_attributes(self._attributes(request, role))
        with self.admission.admit(role, request.texts, deadline) as admitted:
            output = await self.engine.embed(
                request.texts,
                role=role,
                truncate=request.truncate,
                deadline=deadline,
                progress=_timed(admitted.progress, span) if span else admitted.progress,
            )
        if span:
            span.set_attribute("gen_ai.usage.input_tokens", output.tokens)
        return output

    def _attributes(self, request: EmbedRequest, role: Role) -> dict[str, str | int]:
        """The attributes of a request's span that are known before it is admitted."""
        return {
            "gen_ai.request.model": self.identity.model,
            "gen_ai.embeddings.dimension.count": request.dimensions or self.dimensions[0],
            "kalm.identity": self.identity.fingerprint,
            "kalm.role": role,
            "kalm.texts": len(request.texts),
            "kalm.texts_in_progress": sum(self.admission.texts_in_progress.values()),
        }

    async def count_tokens(self, request: EmbedRequest, received: float | None = None) -> list[int]:
        """Tokens of each text of a request, before it is cut to the model's length.

        One request at a time, after all queries: so it needs no admission.

        Raises:
            KalmError: As `embed`, except for texts over the model's length, which are counted.
        """
        deadline = self._checked_deadline(request, received)
        texts, *_ = await _prepared(replace(request, truncate="end"))
        async with within(deadline), self._counting:
            return await self.engine.count_tokens(texts)

    def _checked_deadline(self, request: EmbedRequest, received: float | None) -> float | None:
        """The deadline of a request that can be served."""
        if self.failure is not None:
            raise copy(self.failure)
        if len(request.texts) > MAX_TEXTS:
            raise RequestTooLargeError(
                f"{len(request.texts)} texts in one request; the limit is {MAX_TEXTS}."
            )
        return _deadline(request, time.monotonic() if received is None else received)

    async def close(self) -> None:
        """Close the engine."""
        await self.engine.close()


def cut(texts: list[Any]) -> list[Any]:
    """The texts without what is over `MAX_CHARACTERS`, for truncate="end": no model reads more, and
    tokenizing it would take seconds. Items that are not strings are left unchanged."""
    return [text[:MAX_CHARACTERS] if isinstance(text, str) else text for text in texts]


def _deadline(request: EmbedRequest, received: float) -> float | None:
    """The deadline of a request, a time of `time.monotonic`.

    Raises:
        DeadlineExceededError: It has passed.
    """
    if request.timeout is None:
        return None
    deadline = received + request.timeout
    if deadline <= time.monotonic():
        raise DeadlineExceededError("the deadline passed before the request was complete.")
    return deadline


def _timed(progress: Progress, span: Span) -> Progress:
    """`progress`, which also records the time before and since its first call."""
    queued, started = time.monotonic(), 0.0

    def timed(texts: int) -> None:
        nonlocal started
        now = time.monotonic()
        if not started:
            started = now
            span.set_attribute("kalm.queue.seconds", now - queued)
        span.set_attribute("kalm.engine.seconds", now - started)
        progress(texts)

    return timed


def _characters(request: EmbedRequest) -> int:
    return sum(len(text) for text in request.texts if isinstance(text, str))


def _scheduled_role(request: EmbedRequest) -> Role:
    """The role by which a request is queued. Long queries would delay all others, so they are
    queued as documents."""
    return request.role if _characters(request) <= MAX_QUERY_CHARACTERS else "document"


_Prepared = tuple[list[str], str, list[int]]


async def _prepared(request: EmbedRequest) -> _Prepared:
    """`_prepare`, in a thread if it takes long."""
    if _characters(request) <= _LOOP_CHARACTERS:
        return _prepare(request)
    return await asyncio.to_thread(_prepare, request)


def _prepare(request: EmbedRequest) -> _Prepared:
    """The texts for the engine, the digest of the request, and which texts were cut here.

    Raises:
        InvalidInputError: Texts that cannot be embedded.
    """
    texts = cut(request.texts) if request.truncate == "end" else request.texts
    checked = check_texts(texts, request.truncate)
    over = [index for index, text in enumerate(request.texts) if len(text) > MAX_CHARACTERS]
    return checked, request.digest(), over


def _shortened(vectors: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    """The first `dimensions` numbers of each vector, normalized to unit length again."""
    rows = vectors[:, :dimensions]
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return unit
