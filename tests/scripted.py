"""A transport whose faults and delays a test chooses.

Each vector is a function of its text, so that a vector at the wrong index is detected.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np

from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import EMBEDDED
from kalm_integrations.protocol import (
    EmbedRequest,
    EmbedResponse,
    ServiceDescription,
    ServiceWarning,
)
from kalm_integrations.result import Usage

DIMENSIONS = 512
request_id: ContextVar[str] = ContextVar("request_id", default="")

Fault = Exception | Callable[[EmbedResponse], EmbedResponse] | None
"""Raised, or applied to the correct response; None is no fault."""


def vector_of(text: str, dtype: str = "float16") -> np.ndarray[Any, Any]:
    """The vector of `text`, of unit length."""
    bits = np.frombuffer(hashlib.shake_128(text.encode()).digest(2 * DIMENSIONS), dtype=np.int16)
    vector = bits.astype(np.float32)
    return (vector / np.linalg.norm(vector)).astype(dtype)


def vectors_of(texts: Sequence[str], dtype: str = "float16") -> np.ndarray[Any, Any]:
    """`vector_of` each text, one a row; float32 as `EmbeddingResult.vectors` gives them."""
    rows = np.array([vector_of(text, dtype) for text in texts], dtype=np.float32)
    return rows.reshape(len(texts), DIMENSIONS)


def poisoned(value: float, row: int = 0) -> Callable[[EmbedResponse], EmbedResponse]:
    """Set one number of one vector."""

    def poison(response: EmbedResponse) -> EmbedResponse:
        vectors = response.vectors.copy()
        vectors[row, 7] = value
        return replace(response, vectors=vectors)

    return poison


class ScriptedTransport:
    """See the module.

    Args:
        faults: Of the first, second, ... request; later ones have none.
        delay: Seconds that a request takes.
        refuse: Raises for a request that the service would refuse.
        space: The identity that is reported.
    """

    can_be_cold = True
    service_warnings: tuple[ServiceWarning, ...] = ()

    def __init__(
        self,
        faults: Iterable[Fault] = (),
        *,
        delay: Callable[[EmbedRequest], float] = lambda _: 0.0,
        refuse: Callable[[EmbedRequest], None] = lambda _: None,
        space: SpaceIdentity | None = EMBEDDED.space,
    ) -> None:
        self._faults = iter(faults)
        self._delay = delay
        self._refuse = refuse
        self._space = space
        self.requests: list[EmbedRequest] = []
        self.request_ids: list[str] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.cancelled = 0
        self.answered = 0
        self.closed = 0

    @property
    def sent(self) -> list[str]:
        """Every text that was sent, in order."""
        return [text for request in self.requests for text in request.texts]

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        self.requests.append(request)
        self.request_ids.append(request_id.get())
        fault = next(self._faults, None)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self._delay(request))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1
        if isinstance(fault, Exception):
            raise fault
        self._refuse(request)
        self.answered += 1
        response = EmbedResponse(
            vectors=np.array([vector_of(text, request.dtype) for text in request.texts]),
            identity=self._space,
            usage=Usage(tokens=len(request.texts), requests=1),
            digest=request.digest(),
        )
        return response if fault is None else fault(response)

    async def ensure_ready(self) -> ServiceDescription:
        fault = next(self._faults, None)
        if isinstance(fault, Exception):
            raise fault
        return ServiceDescription(self._space, self.service_warnings)

    async def close(self) -> None:
        self.closed += 1
