"""`EmbeddingService`: what every door serves. Limits, dimensions, packing, usage; one engine."""

from __future__ import annotations

import asyncio
import time
from copy import copy
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kalm_integrations import validation
from kalm_integrations.errors import (
    ConfigurationError,
    InvalidResponseError,
    InvalidText,
    KalmError,
    RequestTooLargeError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.prompts import Role
from kalm_integrations.protocol import EmbedRequest, EmbedResponse, ServiceWarning, Vectors
from kalm_integrations.result import Usage
from kalm_integrations.validation import invalid_rows
from modal_backend.admission import Admission
from modal_backend.engines.base import Engine
from modal_backend.engines.failed import FailedEngine

MAX_TEXTS: Final = 2048
"""Most texts in a request, as in OpenAI's API."""
MAX_QUERY_CHARACTERS: Final = 8192
"""Most characters in a request that goes before documents."""
_ROWS_AT_ONCE: Final = 16
_LOOP_CHARACTERS: Final = 65_536
"""More are checked in a thread, so that the event loop does not stall."""


class EmbeddingService:
    """Requests in, answers out, over one loaded engine."""

    def __init__(self, engine: Engine, admission: Admission | None = None) -> None:
        self.engine = engine
        """May be replaced, when a container finds its engine wrong."""
        self.admission = admission or Admission()
        self.warnings: tuple[ServiceWarning, ...] = ()
        """What an operator has to fix; reported over every endpoint."""

    @property
    def failure(self) -> KalmError | None:
        """Why nothing is served; None when all is well."""
        return self.engine.failure if isinstance(self.engine, FailedEngine) else None

    @property
    def identity(self) -> SpaceIdentity:
        """The loaded engine's own."""
        return self.engine.identity

    @property
    def dimensions(self) -> tuple[int, ...]:
        """What can be asked for, the native number first."""
        return self.engine.dimensions

    @property
    def max_tokens(self) -> int:
        """Longest text."""
        return self.engine.max_tokens

    @property
    def query_template(self) -> str:
        """What the model wants a query to be set into."""
        return self.engine.query_template

    @property
    def in_progress(self) -> dict[Role, int]:
        """Texts queued or computed, by role."""
        return self.admission.in_progress

    def check_admission(self, request: EmbedRequest) -> None:
        """Refuse a request that `embed` would refuse for want of room, at less cost than it does.

        Raises:
            ServiceUnavailableError: It would not finish in time; says when to retry.
        """
        if self.admission.refusing:
            role = _scheduled_role(request)
            self.admission.check(role, request.texts, request.timeout)

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        """Answer one request.

        Raises:
            InvalidInputError: Texts that cannot be embedded, by index within the request.
            ConfigurationError: Dimensions that the engine does not have.
            RequestTooLargeError: Over `MAX_TEXTS` texts.
            DeadlineExceededError: `request.timeout` passed, or will before all is embedded.
            ServiceUnavailableError: Too much is queued for it to finish in time.
            InvalidResponseError: The engine gave wrong vectors, or too few. None is handed out.
            KalmError: `failure`, if there is one.
        """
        if self.failure is not None:
            raise copy(self.failure)
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        if len(request.texts) > MAX_TEXTS:
            raise RequestTooLargeError(
                f"{len(request.texts)} texts in one request; the limit is {MAX_TEXTS}."
            )
        if request.dimensions not in (None, *self.engine.dimensions):
            offered = ", ".join(map(str, self.engine.dimensions))
            raise ConfigurationError(
                f"dimensions={request.dimensions}: {self.identity.model} has {offered}."
            )
        role = _scheduled_role(request)
        if _characters(request) <= _LOOP_CHARACTERS:
            texts, digest = _prepare(request)
        else:
            texts, digest = await asyncio.to_thread(_prepare, request)
        request = replace(request, texts=texts)  # what was cut off need not stay in memory
        with self.admission.admit(role, texts, request.timeout) as admitted:
            output = await self.engine.embed(
                texts,
                role=role,
                truncate=request.truncate,
                deadline=deadline,
                progress=admitted.progress,
            )
        if output.vectors.shape != (len(texts), self.engine.dimensions[0]):
            raise InvalidResponseError(
                f"the engine gave {output.vectors.shape} for {len(texts)} texts."
            )
        dimensions = request.dimensions or self.engine.dimensions[0]
        vectors: Vectors = output.vectors
        as_they_are = vectors.shape[1] == dimensions and vectors.dtype == request.dtype
        if not as_they_are:
            vectors = np.empty((len(texts), dimensions), dtype=request.dtype)
        wrong: list[InvalidText] = []
        for start in range(0, len(texts), _ROWS_AT_ONCE):
            if start:
                await asyncio.sleep(0)  # of so many, others need not wait for all
            rows = output.vectors[start : start + _ROWS_AT_ONCE]
            bad = invalid_rows(rows)  # most callers over HTTP check nothing
            if not bad and rows.shape[1] != dimensions:
                rows = _cut(rows, dimensions)
                bad = invalid_rows(rows)
            wrong += [replace(text, index=start + text.index) for text in bad]
            if not as_they_are:
                vectors[start : start + len(rows)] = rows[:, :dimensions]
        if wrong:
            raise InvalidResponseError.of(wrong)
        return EmbedResponse(
            vectors=vectors,
            identity=self.identity,
            usage=Usage(tokens=output.tokens, requests=1),
            digest=digest,
        )

    async def close(self) -> None:
        """Close the engine."""
        await self.engine.close()


def _characters(request: EmbedRequest) -> int:
    return sum(len(text) for text in request.texts if isinstance(text, str))


def _scheduled_role(request: EmbedRequest) -> Role:
    """The role by which a request is queued: a query that is long would hold up all others."""
    return request.role if _characters(request) <= MAX_QUERY_CHARACTERS else "document"


def _prepare(request: EmbedRequest) -> tuple[list[str], str]:
    """The texts that the engine gets, and the digest of the request.

    Raises:
        InvalidInputError: Texts that cannot be embedded.
    """
    texts = request.texts
    if request.truncate == "end":  # no model takes more, and tokenizing it would take seconds
        texts = [t[: validation.MAX_CHARACTERS] if isinstance(t, str) else t for t in texts]
    return validation.check_texts(texts, request.truncate), request.digest()


def _cut(vectors: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    """The first `dimensions` numbers of each vector, of unit length again."""
    short = vectors[:, :dimensions]
    lengths = np.linalg.norm(short, axis=1, keepdims=True)
    cut: NDArray[np.float32] = np.divide(
        short, lengths, out=np.zeros_like(short), where=lengths > 0
    )
    return cut
