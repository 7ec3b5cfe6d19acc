"""Reference texts, and checks of their vectors against what is known of the real KaLM.

- *order*: a question, with the model card's default instruction, is nearer to its answer than to
  every other answer, within a language and across languages;
- *published values*: the vectors of two texts begin and end with the published numbers;
- *published similarities*: four texts without an instruction have the published cosines.

The last two allow for rounding errors, by quantization (`TOLERANCES`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from kalm_integrations import prompts
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import KALM, KALM_FP8, KALM_INT8
from kalm_integrations.validation import invalid_rows

if TYPE_CHECKING:
    from kalm_integrations.client import KalmClient

DIMENSIONS: Final = KALM.dimensions[0]
OUTLIERS: Final = 2
"""How many of the 12 published values may differ by more than `Tolerance.value`."""

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest allowed absolute differences: of a published value, of up to `OUTLIERS` published
    values, of a published cosine."""

    value: float
    outlier: float
    similarity: float


# Vectors of one text with cosine c differ in each value by about sqrt(2 * (1 - c) / 3840): 3e-4 in
# bf16 (c = .99986), 5e-4 in int8 (c = .9996; lowest .998), 1.3e-3 in fp8 (c = .997; lowest .988),
# 7e-3 with mean pooling (c = .908). With normal noise, the rule for values accepts a share of .9999
# at c = .999 and 1e-5 at .908 in bf16, and of .999 at .988 and .07 at .908 in fp8.
TOLERANCES: Final = {
    KALM.space.quantization: Tolerance(value=2e-3, outlier=6e-3, similarity=0.02),
    KALM_INT8.space.quantization: Tolerance(value=3e-3, outlier=8e-3, similarity=0.03),
    KALM_FP8.space.quantization: Tolerance(value=6e-3, outlier=12e-3, similarity=0.05),
}
"""By the quantization of a service's identity."""
WIDEST: Final = TOLERANCES[KALM_FP8.space.quantization]
"""For any other quantization, or an unknown one."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and its answer."""

    languages: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Published:
    """A text, and the first and last values of its vector."""

    sentence: str
    first: tuple[float, float, float]
    last: tuple[float, float, float]

    @property
    def text(self) -> str:
        """The text as it is embedded, with its instruction."""
        return prompts.apply(prompts.task_template(_PUBLISHED_TASK), self.sentence)


@dataclass(frozen=True, slots=True)
class Similarity:
    """Two texts without an instruction, and the published cosine of their vectors."""

    first: str
    second: str
    cosine: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of `judge`.

    Attributes:
        checks: Each check, with the largest difference.
        failures: Each failure: the check, the expected and the actual value.
        similarities: Cosines in the order of `SIMILARITIES`; empty if no check was possible.
    """

    checks: tuple[str, ...]
    failures: tuple[str, ...]
    similarities: tuple[float, ...] = ()

    def __str__(self) -> str:
        text = "; ".join(self.failures) or f"{', '.join(self.checks)}: as they should be"
        if not self.similarities:
            return text
        pairs = zip(self.similarities, SIMILARITIES, strict=True)
        cosines = ", ".join(f"{cosine:.3f} ({pair.cosine:.3f})" for cosine, pair in pairs)
        return f"{text}; similarities (published): {cosines}"


PAIRS: Final = (
    Pair(
        "English",
        "How tall is K2?",
        "K2, the second-highest mountain on Earth, rises 8,611 metres above sea level.",
    ),
    Pair(
        "Chinese",
        "尼罗河流经多少个国家？",
        "尼罗河是非洲最长的河流，流经十一个国家，最后注入地中海。",
    ),
    Pair(
        "Spanish",
        "¿Cómo se calcula la mediana?",
        "La mediana se obtiene ordenando los valores y tomando el que queda en el centro.",
    ),
    Pair(
        "German and English",
        "Warum geht Brot auf?",
        "Bread rises because yeast gives off gas in the dough.",
    ),
    Pair(
        "English and Japanese",
        "Why do leaves change colour in autumn?",
        "秋になると葉緑素が分解され、木の葉は赤や黄色に変わります。",
    ),
    Pair(
        "Arabic and French",
        "كيف ينتقل مرض الملاريا؟",
        "Le paludisme se transmet par la piqûre de moustiques infectés.",
    ),
)
"""Each is about a different subject, so that no other answer fits."""

_PUBLISHED_TASK: Final = "Classifying the category of french news."
PUBLISHED: Final = (
    Published(
        "This is an example sentence",
        (-0.01867676, 0.02319336, 0.00280762),
        (-0.02075195, 0.00196838, -0.0703125),
    ),
    Published(
        "Each sentence is converted",
        (-0.0067749, 0.03491211, 0.01434326),
        (-0.0043335, 0.00509644, -0.04174805),
    ),
)
"""The model card's example. sentence-transformers printed the values in bf16, with the original
weights; a public port of the model keeps them."""

_CAPITAL: Final = "What is the capital of China?"
_GRAVITY: Final = "Explain gravity"
_CAPITAL_ANSWER: Final = "The capital of China is Beijing."
_GRAVITY_ANSWER: Final = (
    "Gravity is a force that attracts two bodies towards each other. It gives weight to physical "
    "objects and is responsible for the movement of planets around the sun."
)
# From the test data of an Apache-2.0 port of the model to Go, computed by transformers in bf16.
SIMILARITIES: Final = (
    Similarity(_CAPITAL, _CAPITAL_ANSWER, 0.9320),
    Similarity(_GRAVITY, _GRAVITY_ANSWER, 0.7313),
    Similarity(_CAPITAL, _GRAVITY_ANSWER, 0.3971),
    Similarity(_GRAVITY, _CAPITAL_ANSWER, 0.4251),
    Similarity(_CAPITAL, _GRAVITY, 0.4569),
    Similarity(_CAPITAL_ANSWER, _GRAVITY_ANSWER, 0.3843),
)

TEXTS: Final = (
    *(prompts.apply(prompts.RETRIEVAL, pair.question) for pair in PAIRS),
    # Reversed: otherwise vectors that are all shifted by one would be in order.
    *(pair.answer for pair in reversed(PAIRS)),
    *(published.text for published in PUBLISHED),
    *(_CAPITAL, _GRAVITY, _CAPITAL_ANSWER, _GRAVITY_ANSWER),
)
"""Embedded as they are, since they contain their instructions."""


def applies_to(space: SpaceIdentity) -> bool:
    """Whether vectors of `space` must pass."""
    return space.model == KALM.space.model


def embed(client: KalmClient) -> Vectors:
    """Embed `TEXTS` as they are, with native dimensions, whatever the options of `client`."""
    with client.with_options(
        dimensions=None,
        document_instruction="none",
        vector_dtype="float32",
        show_progress=False,
    ) as plain:
        return plain.embed(TEXTS, role="document").vectors


def judge(vectors: NDArray[Any], quantization: str | None) -> Verdict:
    """Compare the vectors of `TEXTS` with what is known of them.

    Args:
        vectors: In the order of `TEXTS`, with native dimensions.
        quantization: Of the service's identity; None if it reports none.
    """
    shape = (len(TEXTS), DIMENSIONS)
    if vectors.shape != shape:
        return Verdict((), (f"form: vectors of shape {vectors.shape} instead of {shape}",))
    if invalid := invalid_rows(vectors):
        return Verdict((), (f"form: {TEXTS[invalid[0].index]!r} {invalid[0].reason}",))
    tolerance = TOLERANCES.get(quantization or "", WIDEST)
    by_text = dict(zip(TEXTS, vectors, strict=True))
    cosines = tuple(float(by_text[pair.first] @ by_text[pair.second]) for pair in SIMILARITIES)
    results = (_order(vectors), _values(by_text, tolerance), _similarities(cosines, tolerance))
    failures = tuple(failure for _, failures in results for failure in failures)
    return Verdict(tuple(check for check, _ in results), failures, cosines)


def _order(vectors: NDArray[Any]) -> tuple[str, list[str]]:
    count = len(PAIRS)
    cosines = vectors[:count] @ vectors[count : 2 * count][::-1].T
    failures = []
    for row, pair in enumerate(PAIRS):
        others = np.where(np.arange(count) == row, -np.inf, cosines[row])
        nearest = int(others.argmax())
        if not cosines[row, row] > others[nearest]:
            failures.append(
                f"order: {pair.question!r} ({pair.languages}) has cosine {cosines[row, row]:.3f} "
                f"to its answer and {others[nearest]:.3f} to {PAIRS[nearest].answer!r}"
            )
    return f"order of {count} pairs", failures


def _values(by_text: dict[str, NDArray[Any]], tolerance: Tolerance) -> tuple[str, list[str]]:
    vectors = [by_text[published.text] for published in PUBLISHED]
    actual = np.array([[*vector[:3], *vector[-3:]] for vector in vectors])
    expected = np.array([published.first + published.last for published in PUBLISHED])
    off = np.abs(actual - expected)
    outside = off > tolerance.value
    check = f"{off.size} published values (off by up to {off.max():.4f})"
    if outside.sum() <= OUTLIERS and off.max() <= tolerance.outlier:
        return check, []
    texts = ", ".join(
        f"{PUBLISHED[row].sentence!r} has {_ends(actual[row])} instead of {_ends(expected[row])}"
        for row in np.flatnonzero(outside.any(axis=1))
    )
    return check, [
        f"published values: {outside.sum()} of {off.size} are off by more than {tolerance.value}, "
        f"the farthest by {off.max():.4f} (allowed: {OUTLIERS}, by up to {tolerance.outlier}): "
        f"{texts}"
    ]


def _similarities(cosines: tuple[float, ...], tolerance: Tolerance) -> tuple[str, list[str]]:
    off = np.array([abs(c - pair.cosine) for pair, c in zip(SIMILARITIES, cosines, strict=True)])
    check = f"{off.size} published similarities (off by up to {off.max():.4f})"
    outside = int((off > tolerance.similarity).sum())
    if not outside:
        return check, []
    farthest = int(off.argmax())
    pair = SIMILARITIES[farthest]
    return check, [
        f"published similarities: {outside} of {off.size} are off by more than "
        f"{tolerance.similarity}, the farthest by {off.max():.4f}: {pair.first!r} and "
        f"{pair.second!r} have {cosines[farthest]:.4f} instead of {pair.cosine:.4f}"
    ]


def _ends(values: NDArray[Any]) -> str:
    first, last = (", ".join(f"{value:.4f}" for value in part) for part in (values[:3], values[3:]))
    return f"[{first} … {last}]"
