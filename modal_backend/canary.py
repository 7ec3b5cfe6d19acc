"""Checks the vectors of an engine after a load, and again after a restore, before it serves.

KaLM must also have the published vectors of the reference texts; none are known of other models.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kalm_integrations import prompts, reference
from kalm_integrations.errors import CanaryFailedError
from kalm_integrations.models import FP8, INT8
from kalm_integrations.validation import invalid_rows
from modal_backend.engines.base import Engine

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
"""Least cosine of two vectors of one text in bf16. With real weights a text alone and in a batch
had 0.9998."""
SAME_BY_QUANTIZATION: Final = {FP8: 0.996, INT8: SAME}
"""The same in fp8, where a small difference in bf16 rounds some inputs to the next number: with
random weights fp8 was four times as noisy as bf16. With int8 weights inputs stay in bf16."""

Vectors = NDArray[np.float32]


async def check(engine: Engine, before: Vectors | None = None) -> Vectors:
    """Embed the canary's texts, and the reference texts with KaLM, and check the vectors.

    Args:
        engine: Loaded and awake.
        before: The earlier result for the same weights, to compare with.

    Returns:
        The vectors, shape (texts, dimensions).

    Raises:
        CanaryFailedError: Names the failed check, the expected and the actual value.
        KalmError: The engine failed.
    """
    checks = ["form", "each text alone", "differences"]
    same = SAME_BY_QUANTIZATION.get(engine.identity.quantization, SAME)
    vectors = await _embed(engine, list(TEXTS))
    # One after the other: concurrent calls would be one batch again.
    alone = np.concatenate([await _embed(engine, [text]) for text in TEXTS])
    batch = "texts in one batch do not have the vectors that they have alone"
    _check_same(same, batch, vectors, alone)
    cosines = np.triu(vectors @ vectors.T, 1)
    if cosines.max() > same:
        first, second = np.unravel_index(cosines.argmax(), cosines.shape)
        raise CanaryFailedError(
            f"two different texts have one vector: {TEXTS[first]!r} and {TEXTS[second]!r} have "
            f"cosine {cosines.max():.5f}, expected is at most {same}."
        )
    instructed = await _embed(engine, [prompts.apply(prompts.RETRIEVAL, TEXTS[0])])
    if (cosine := float(instructed[0] @ vectors[0])) > same:
        raise CanaryFailedError(
            f"an instruction does not change the vector of {TEXTS[0]!r}: cosine {cosine:.5f}, "
            f"expected is at most {same}."
        )
    if before is not None:
        _check_same(same, "vectors are not those of before the snapshot", vectors, before)
        _check_same(
            same, "single texts do not have the vectors of before the snapshot", alone, before
        )
        checks.append("vectors of before")
    if reference.applies_to(engine.identity):
        published = await _embed(engine, list(reference.TEXTS))
        verdict = reference.judge(published, engine.identity.quantization)
        if verdict.failures:
            raise CanaryFailedError(f"these are not KaLM's vectors: {verdict}.")
        checks += verdict.checks
    log.info("the canary's checks passed: %s", ", ".join(checks))
    return vectors


async def _embed(engine: Engine, texts: list[str]) -> Vectors:
    output = await engine.embed(texts, role="query", truncate="error", deadline=None)
    _check_form(output.vectors, (len(texts), engine.dimensions[0]))
    return output.vectors


def _check_form(vectors: NDArray[Any], shape: tuple[int, int]) -> None:
    if vectors.shape != shape:
        raise CanaryFailedError(f"vectors of shape {vectors.shape} instead of {shape}.")
    if invalid := invalid_rows(vectors):
        rows = f"{len(invalid)} of {len(vectors)} texts"
        raise CanaryFailedError(f"invalid vectors of {rows}; the first one {invalid[0].reason}.")


def _check_same(same: float, failure: str, vectors: Vectors, others: Vectors) -> None:
    cosines = np.einsum("ij,ij->i", vectors, others)
    if not (cosines >= same).all():  # so that NaN fails
        row = int(cosines.argmin())  # the first NaN if there is one
        raise CanaryFailedError(
            f"{failure}: cosine {cosines[row]:.5f} instead of at least {same} for {TEXTS[row]!r}."
        )
