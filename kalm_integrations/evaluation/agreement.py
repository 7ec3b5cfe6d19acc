"""How far two sets of vectors of the same texts agree: in direction, in hits, in their order.

Arrays in, arrays out. Neither set is ever compared with the other but row by row: rankings are
made within each. All arithmetic is float64, in blocks, so that memory is bounded by the vectors
themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

DEPTH: Final = 100
"""Nearest documents of the baseline whose order is compared."""

_DECIMALS: Final = 6
"""Of a cosine that two documents are ranked by. What is finer is noise of float16, in which
vectors travel, and would order copies by chance."""
_ROWS: Final = 1024  # vectors that are float64 at a time
_CELLS: Final = 2**21  # cosines of a block of queries to all documents

Vectors = NDArray[np.floating[Any]]
Figures = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Vectored:
    """What one deployment made of the texts: a vector a row, of any type of floats."""

    documents: Vectors
    queries: Vectors


@dataclass(frozen=True, slots=True)
class Rankings:
    """How far the rankings of two deployments agree, query by query.

    Attributes:
        overlap: For each k the share of the baseline's first k documents that are among the
            candidate's first k.
        order: Spearman's correlation over the baseline's first `depth` documents; NaN where all
            of them are equally near, in either deployment.
        ranked: Documents that each query was compared with.
        depth: As `DEPTH`, or `ranked` where there are fewer.
    """

    overlap: dict[int, Figures]
    order: Figures
    ranked: int
    depth: int


@dataclass(frozen=True, slots=True)
class Spread:
    """How figures are distributed, and which of them is the least."""

    least: float
    p1: float
    p5: float
    median: float
    mean: float
    least_at: int

    @classmethod
    def of(cls, figures: Figures) -> Self:
        """NaN is left out; there must be at least one figure that is none."""
        p1, p5, median = np.nanpercentile(figures, [1, 5, 50]).tolist()
        at = int(np.nanargmin(figures))
        return cls(float(figures[at]), p1, p5, median, float(np.nanmean(figures)), at)


def cosines(baseline: Vectors, candidate: Vectors) -> Figures:
    """The cosine of each row of one to the same row of the other."""
    parts = [
        np.einsum("ij,ij->i", _unit(baseline[rows]), _unit(candidate[rows]))
        for rows in _blocks(len(baseline), _ROWS)
    ]
    return np.concatenate(parts).clip(-1, 1)


def compare(
    baseline: Vectored,
    candidate: Vectored,
    ks: Sequence[int],
    own: NDArray[np.int64] | None = None,
) -> Rankings:
    """Rank all documents for each query, in each deployment, and compare the rankings.

    Documents that are equally near are ranked by their place, in both.

    Args:
        baseline: What is to be kept to.
        candidate: Of the same texts, in the same order.
        ks: Each at least 1, and less than the documents that are ranked.
        own: For each query a document that is left out: the one that it was taken from.

    Returns:
        The comparison, a row a query.
    """
    ranked = len(baseline.documents) - (own is not None)
    depth = min(DEPTH, ranked)
    overlap = {k: [np.empty(0)] for k in ks}
    order = [np.empty(0)]
    for rows in _blocks(len(baseline.queries), max(1, _CELLS // len(baseline.documents))):
        left_out = None if own is None else own[rows]
        near, far = (_ranked(each, rows, left_out) for each in (baseline, candidate))
        first = _first(near)
        place = np.argsort(_first(far), axis=1)  # of each document, in the candidate's ranking
        for k in ks:
            places = np.take_along_axis(place, first[:, :k], axis=1)
            overlap[k].append((places < k).mean(axis=1))
        scores = (np.take_along_axis(each, first[:, :depth], axis=1) for each in (near, far))
        order.append(np.array([spearman(*pair) for pair in zip(*scores, strict=True)]))
    return Rankings(
        {k: np.concatenate(parts) for k, parts in overlap.items()},
        np.concatenate(order),
        ranked,
        depth,
    )


def spearman(one: Figures, other: Figures) -> float:
    """Spearman's rank correlation: ties have the mean of their ranks. NaN where all are tied."""
    x, y = _ranks(one), _ranks(other)
    x, y = x - x.mean(), y - y.mean()
    lengths = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / lengths) if lengths else np.nan


def _ranks(values: Figures) -> Figures:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    means: Figures = np.cumsum(sizes) - (sizes - 1) / 2
    return means[group]


def _ranked(vectored: Vectored, rows: slice, left_out: NDArray[np.int64] | None) -> Figures:
    """What documents are ranked by, for each query in `rows`."""
    queries = _unit(vectored.queries[rows])
    parts = [
        queries @ _unit(vectored.documents[block]).T
        for block in _blocks(len(vectored.documents), _ROWS)
    ]
    scores = np.concatenate(parts, axis=1).round(_DECIMALS)
    if left_out is not None:
        scores[np.arange(len(scores)), left_out] = -np.inf
    return scores


def _first(scores: Figures) -> NDArray[np.intp]:
    """Documents, the nearest first; of equal ones that with the lower index."""
    return np.argsort(-scores, axis=1, kind="stable")


def _unit(vectors: Vectors) -> Figures:
    """Of unit length to the last bit: rounded to float16, a vector is not."""
    wide = vectors.astype(np.float64)
    lengths: Figures = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / lengths


def _blocks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, start + size)
