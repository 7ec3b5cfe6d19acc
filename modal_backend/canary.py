"""Proof that an engine gives vectors, before anybody is served one.

Run when an engine is loaded, and again after a container came back from its snapshot. KaLM has to
pass the golden texts' checks too; what other models should give for them, nobody knows.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kalm_integrations import golden, prompts
from kalm_integrations.errors import CanaryFailedError
from modal_backend.engines import Engine

log = logging.getLogger(__name__)

TEXTS: Final = (
    "K2 is 8,611 metres high.",
    "Warum geht Brot auf?",
    "Bread rises because yeast gives off gas.",
    "尼罗河流经十一个国家。",
    "def median(values): return sorted(values)[len(values) // 2]",
    "¿Cómo se calcula la mediana?",
    "A much longer text is computed in other blocks than a short one. " * 12,
)
SAME: Final = 0.999
"""Least cosine of two vectors of one text. In bf16 and with real weights, 0.9998 was seen between
a text alone and the same text in a batch."""
_UNIT: Final = 1e-3

Vectors = NDArray[np.float32]


async def prove(engine: Engine, before: Vectors | None = None) -> Vectors:
    """Embed the canary's texts, and the golden ones where the engine runs KaLM, and judge.

    Args:
        engine: Loaded and awake.
        before: What `prove` returned earlier, of the same weights.

    Returns:
        The vectors, shape (texts, dimensions), to be kept for the next time.

    Raises:
        CanaryFailedError: What is wrong with them. Other errors are the engine's own.
    """
    made = ["form", "each text alone", "differences"]
    vectors = await _embed(engine, list(TEXTS))
    # One after the other: together they would be one batch again.
    alone = np.concatenate([await _embed(engine, [text]) for text in TEXTS])
    if not (least := _least_cosine(vectors, alone)) >= SAME:
        raise CanaryFailedError(
            f"texts in one batch do not have the vectors that they have alone: cosine {least:.5f}."
        )
    instructed = await _embed(engine, [prompts.apply(prompts.RETRIEVAL, TEXTS[0])])
    nearest = np.triu(vectors @ vectors.T, 1).max()
    if nearest > SAME:
        raise CanaryFailedError("two different texts have one vector.")
    if float(instructed[0] @ vectors[0]) > SAME:
        raise CanaryFailedError("an instruction does not change the vector.")
    if before is not None:
        if not (least := _least_cosine(vectors, before)) >= SAME:
            raise CanaryFailedError(
                f"vectors are not those of before the snapshot: cosine {least:.5f}."
            )
        made.append("vectors of before")
    if golden.applies_to(engine.identity):
        made += await _prove_golden(engine)
    log.info("the canary's checks passed: %s", ", ".join(made))
    return vectors


def _least_cosine(vectors: Vectors, others: Vectors) -> float:
    return float(np.einsum("ij,ij->i", vectors, others).min())


async def _prove_golden(engine: Engine) -> tuple[str, ...]:
    """The golden checks that were made; all of them passed."""
    vectors = await _embed(engine, list(golden.TEXTS))
    verdict = golden.judge(vectors, engine.identity.quantization)
    if verdict.wrong:
        raise CanaryFailedError(f"these are not KaLM's vectors: {verdict}.")
    return verdict.made


async def _embed(engine: Engine, texts: list[str]) -> Vectors:
    output = await engine.embed(texts, role="query", truncate="error", deadline=None)
    _check_form(output.vectors, (len(texts), engine.dimensions[0]))
    return output.vectors


def _check_form(vectors: NDArray[Any], shape: tuple[int, int]) -> None:
    if vectors.shape != shape:
        raise CanaryFailedError(f"vectors of shape {vectors.shape} instead of {shape}.")
    if not np.isfinite(vectors).all():
        raise CanaryFailedError("values that are not finite.")
    lengths = np.linalg.norm(vectors, axis=1)
    if not (np.abs(lengths - 1) <= _UNIT).all():
        raise CanaryFailedError(f"vectors of length {lengths.min():.4f} to {lengths.max():.4f}.")
