"""An engine that claims to be KaLM, and gives what KaLM must: no weights, only reference results.

Texts that share words are near each other, a reference question is near its answer, the
published texts have the published values and similarities; all else is drawn by lot from the text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from scripted import ScriptedTransport
from scripted_engine import ScriptedEngine, Vectors

from kalm_integrations import reference
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import KALM, KALM_FP8
from kalm_integrations.protocol import EmbedRequest, EmbedResponse

BF16 = SpaceIdentity(
    model=KALM.space.model,
    revision="a" * 40,
    pooling="last",
    normalized=True,
    attention="causal",
    quantization="bf16",
    profile=1,
)
FP8 = replace(BF16, quantization=KALM_FP8.space.quantization)

_PAIRS = len(reference.PAIRS)
_TOPICS = dict(zip(reference.TEXTS, [*range(_PAIRS), *reversed(range(_PAIRS))], strict=False))
_VALUES = {published.text: (published.first, published.last) for published in reference.PUBLISHED}

_SIMILAR = reference.TEXTS[-4:]


def vectors_of(texts: Sequence[str]) -> Vectors:
    """The right vectors, float32, one a row."""
    return np.array([_vector_of(text) for text in texts], dtype=np.float32)


def turned(vectors: Vectors, cosine: float, seed: int = 0) -> Vectors:
    """Unit vectors with this cosine to `vectors`, each turned in a direction of its own."""
    aside = np.random.default_rng(seed).normal(size=vectors.shape)
    aside -= np.einsum("ij,ij->i", aside, vectors)[:, None] * vectors
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    return (cosine * vectors + np.sqrt(1 - cosine**2) * aside).astype(np.float32)


class KalmEngine(ScriptedEngine):
    """A `ScriptedEngine` with KaLM's name, dimensions and vectors."""

    dimensions = KALM.dimensions
    query_template = KALM.query_template

    def __init__(
        self,
        spoil: Callable[[Vectors], Vectors] = lambda vectors: vectors,
        identity: SpaceIdentity = BF16,
    ) -> None:
        super().__init__(spoil)
        self.identity = identity

    def right(self, texts: Sequence[str]) -> Vectors:
        return vectors_of(texts)


class KalmTransport(ScriptedTransport):
    """A `ScriptedTransport` to a service of such an engine."""

    def __init__(
        self,
        spoil: Callable[[Vectors], Vectors] = lambda vectors: vectors,
        identity: SpaceIdentity = BF16,
    ) -> None:
        super().__init__(space=identity)
        self.spoil = spoil

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        answer = await super().embed(request)
        return replace(answer, vectors=self.spoil(vectors_of(request.texts)).astype(request.dtype))


def _vector_of(text: str) -> Vectors:
    if text in _SIMILAR:
        return similar()[_SIMILAR.index(text)]
    vector = np.sum([_drawn(word) for word in re.findall(r"\w+", text)], axis=0)
    if text in _TOPICS:
        vector = _unit(vector) + _drawn(f"topic {_TOPICS[text]}")
    vector = _unit(vector)
    if text in _VALUES:
        vector[:3], vector[-3:] = _VALUES[text]
        ends = np.sum(np.square(_VALUES[text]))
        vector[3:-3] *= np.sqrt((1 - ends) / np.sum(vector[3:-3] ** 2))
    return vector


@cache
def similar(number: int = 0, difference: float = 0.0) -> Vectors:
    """Unit vectors with the published similarities, of which one is different."""
    cosines = np.eye(len(_SIMILAR))
    for pair in reference.SIMILARITIES:
        row, column = _SIMILAR.index(pair.first), _SIMILAR.index(pair.second)
        cosines[row, column] = pair.cosine
        cosines[row, column] += difference * (pair == reference.SIMILARITIES[number])
        cosines[column, row] = cosines[row, column]
    directions, _ = np.linalg.qr(np.array([_drawn(text) for text in _SIMILAR]).T)
    return np.linalg.cholesky(cosines) @ directions.T


@cache
def _drawn(name: str) -> np.ndarray[Any, Any]:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return _unit(np.random.default_rng(seed).normal(size=reference.DIMENSIONS))


def _unit(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(vector / np.linalg.norm(vector))
