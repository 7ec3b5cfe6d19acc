"""Figures of a comparison: by hand, by a slow way to the same, and by what must not matter."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kalm_integrations.evaluation import agreement
from kalm_integrations.evaluation.agreement import (
    Spread,
    Vectored,
    compare,
    cosines,
    spearman,
)

SEEDS = st.integers(0, 2**32 - 1)
COUNTS = st.integers(4, 12)
NUMBERS = st.lists(st.integers(-3, 3), min_size=2, max_size=9).map(np.array)


def drawn(seed: int, documents: int, queries: int, dimensions: int = 8) -> Vectored:
    random = np.random.default_rng(seed)
    return Vectored(
        random.normal(size=(documents, dimensions)), random.normal(size=(queries, dimensions))
    )


def few(seed: int, documents: int, queries: int) -> Vectored:
    """Vectors of few directions: most documents are as near as another one."""
    random = np.random.default_rng(seed)
    return Vectored(*(1.0 + random.integers(0, 2, size=(n, 3)) for n in (documents, queries)))


def at(*degrees: float) -> np.ndarray[Any, Any]:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def slowly(
    baseline: Vectored, candidate: Vectored, k: int, own: list[int] | None
) -> tuple[list[float], list[float]]:
    """Overlap and order, as one would say it in words."""
    overlap, order = [], []
    for row in range(len(baseline.queries)):
        others = [d for d in range(len(baseline.documents)) if own is None or d != own[row]]
        scores, first = [], []
        for each in (baseline, candidate):
            query = each.queries[row]
            score = {
                d: round(
                    float(each.documents[d] @ query)
                    / float(np.linalg.norm(each.documents[d]) * np.linalg.norm(query)),
                    6,
                )
                for d in others
            }
            scores.append(score)
            first.append(sorted(others, key=lambda d, score=score: (-score[d], d)))
        overlap.append(len({*first[0][:k]} & {*first[1][:k]}) / k)
        order.append(slow_spearman(*([score[d] for d in others] for score in scores)))
    return overlap, order


def slow_spearman(one: list[float], other: list[float]) -> float:
    x, y = (
        [sum(v < w for v in values) + (sum(v == w for v in values) + 1) / 2 for w in values]
        for values in (one, other)
    )
    if len({*x}) == 1 or len({*y}) == 1:
        return np.nan
    return float(np.corrcoef(x, y)[0, 1])


# --- the cosine of a text's two vectors


def test_cosines_by_hand() -> None:
    found = cosines(at(0, 0, 0, 90) * [[1], [5], [1], [1]], at(0, 60, 180, 0))
    np.testing.assert_allclose(found, [1, 0.5, -1, 0], atol=1e-12)


@given(SEEDS, st.integers(1, 5000))
def test_cosines_are_of_the_same_row_in_every_block(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    one, other = random.normal(size=(2, count, 3))
    right = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    np.testing.assert_allclose(cosines(one, other), right, atol=1e-12)


@given(SEEDS)
def test_vectors_that_travelled_as_float16_still_have_a_cosine_of_1(seed: int) -> None:
    vectors = drawn(seed, 9, 1, 512).documents
    packed = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    np.testing.assert_allclose(cosines(packed, packed), 1, atol=1e-12)
    assert cosines(packed, vectors).min() > 0.999999


# --- rankings


def test_rankings_by_hand() -> None:
    baseline = Vectored(at(10, 20, 30, 40), at(0))
    candidate = Vectored(at(20, 10, 40, 30), at(0))  # the first two, and the last two, swapped
    found = compare(baseline, candidate, [1, 2, 3])
    assert {k: each.tolist() for k, each in found.overlap.items()} == {
        1: [0],
        2: [1],
        3: [pytest.approx(2 / 3)],
    }
    assert found.order == pytest.approx([0.6])  # 1 - 6 * 4 / (4 * 15)
    assert (found.ranked, found.depth) == (4, 4)


def test_a_querys_own_document_is_left_out_by_hand() -> None:
    baseline = Vectored(at(0, 20, 30), at(0, 1))
    candidate = Vectored(at(0, 30, 20), at(0, 1))
    found = compare(baseline, candidate, [1], np.array([0, 2]))
    assert found.overlap[1].tolist() == [0, 1]
    assert found.order.tolist() == [-1, 1]
    assert found.ranked == found.depth == 2


@given(SEEDS, COUNTS, COUNTS, st.integers(1, 3), st.booleans(), st.sampled_from([drawn, few]))
def test_rankings_are_those_found_slowly(
    seed: int, documents: int, queries: int, k: int, left_out: bool, make: Any
) -> None:
    baseline, candidate = make(seed, documents, queries), make(seed + 1, documents, queries)
    own = np.random.default_rng(seed).integers(0, documents, queries) if left_out else None
    assume(k < documents - left_out)
    found = compare(baseline, candidate, [k], own)
    overlap, order = slowly(baseline, candidate, k, None if own is None else own.tolist())
    np.testing.assert_allclose(found.overlap[k], overlap)
    np.testing.assert_allclose(found.order, order, atol=1e-12)


@given(SEEDS, COUNTS, COUNTS, st.sampled_from([drawn, few]))
def test_the_same_vectors_agree_in_everything(
    seed: int, documents: int, queries: int, make: Any
) -> None:
    same = make(seed, documents, queries)
    found = compare(same, same, [1, 2, 3])
    assert {value for each in found.overlap.values() for value in each} == {1.0}
    defined = found.order[~np.isnan(found.order)]
    np.testing.assert_allclose(defined, 1)


@given(SEEDS, COUNTS, COUNTS)
def test_one_space_is_never_compared_with_the_other(
    seed: int, documents: int, queries: int
) -> None:
    """Turned as a whole, vectors are others, and every ranking is the same."""
    baseline = drawn(seed, documents, queries)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(8, 8)))[0]
    found = compare(
        baseline, Vectored(baseline.documents @ turn, baseline.queries @ turn), [1, 2, 3]
    )
    assert {value for each in found.overlap.values() for value in each} == {1.0}
    np.testing.assert_allclose(found.order, 1)


@given(SEEDS, COUNTS, COUNTS)
def test_the_order_of_documents_and_queries_does_not_matter(
    seed: int, documents: int, queries: int
) -> None:
    random = np.random.default_rng(seed)
    one, other = drawn(seed, documents, queries), drawn(seed + 1, documents, queries)
    own = random.integers(0, documents, queries)
    rows, asked = random.permutation(documents), random.permutation(queries)
    moved = [Vectored(each.documents[rows], each.queries[asked]) for each in (one, other)]
    before = compare(one, other, [1, 2], own)
    after = compare(*moved, [1, 2], np.argsort(rows)[own[asked]])
    for k in (1, 2):
        np.testing.assert_array_equal(before.overlap[k][asked], after.overlap[k])
    np.testing.assert_allclose(before.order[asked], after.order, atol=1e-12)


@given(SEEDS)
def test_copies_in_the_corpus_are_ranked_the_same_way_in_both(seed: int) -> None:
    """float16 has its noise: it must not order what is as near."""
    vectors = drawn(seed, 6, 5, 64)
    copies = Vectored(np.repeat(vectors.documents, 4, axis=0).astype(np.float16), vectors.queries)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(64, 64)))[0]
    turned = Vectored(copies.documents @ turn, copies.queries @ turn)
    found = compare(copies, turned, [1, 2, 3, 5])
    assert {value for each in found.overlap.values() for value in each} == {1.0}


def test_a_candidate_that_tells_nothing_apart_does_not_agree() -> None:
    baseline = drawn(0, 200, 50)
    nothing = Vectored(np.ones_like(baseline.documents), baseline.queries)
    found = compare(baseline, nothing, [10])
    assert found.overlap[10].mean() < 0.1  # 0.05 by chance
    assert np.isnan(found.order).all()


def test_only_the_first_hundred_are_put_in_order() -> None:
    degrees = np.linspace(1, 80, 250)
    behind = np.concatenate([degrees[:100], degrees[:99:-1]])  # reversed after the hundredth
    found = compare(Vectored(at(*degrees), at(0)), Vectored(at(*behind), at(0)), [100, 150])
    assert (found.depth, found.order.tolist()) == (100, [pytest.approx(1)])
    assert {k: each.tolist() for k, each in found.overlap.items()} == {
        100: [1.0],
        150: [pytest.approx(2 / 3)],
    }


def test_it_is_the_baselines_first_documents_that_are_put_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agreement, "DEPTH", 3)
    baseline = Vectored(at(10, 20, 30, 40, 50), at(0))
    candidate = Vectored(at(50, 40, 30, 10, 20), at(0))
    assert compare(baseline, candidate, [1]).order == pytest.approx([-1])
    assert compare(candidate, baseline, [1]).order == pytest.approx([-0.5])


@pytest.mark.parametrize(("rows", "cells"), [(1, 1), (3, 40), (7, 61), (1024, 2**21)])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, rows: int, cells: int) -> None:
    one, other = drawn(1, 20, 11), drawn(2, 20, 11)
    own = np.arange(11)
    whole = compare(one, other, [1, 5], own)
    monkeypatch.setattr(agreement, "_ROWS", rows)
    monkeypatch.setattr(agreement, "_CELLS", cells)
    found = compare(one, other, [1, 5], own)
    np.testing.assert_array_equal(found.overlap[5], whole.overlap[5])
    np.testing.assert_allclose(found.order, whole.order)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_CELLS", 2**17)
    random = np.random.default_rng(0)
    one = Vectored(*(random.normal(size=(n, 64)).astype(np.float16) for n in (10_000, 500)))
    tracemalloc.start()
    compare(one, one, [1, 10])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20  # all cosines would be 40 MB, twice, and their order as much


# --- Spearman's rank correlation


def test_spearman_by_hand() -> None:
    assert spearman(np.array([1.0, 2, 3]), np.array([5.0, 70, 80])) == 1
    assert spearman(np.array([1.0, 2, 3]), np.array([8.0, 7, -6])) == -1
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4
    tied = spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 4]))
    assert tied == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(spearman(np.array([1.0, 1, 1]), np.array([1.0, 2, 3])))


@given(st.permutations(range(7)))
def test_without_ties_it_is_the_formula_of_squared_differences(order: list[int]) -> None:
    x, y = np.arange(7.0), np.array(order, dtype=float)
    assert spearman(x, y) == pytest.approx(1 - 6 * ((x - y) ** 2).sum() / (7 * 48))


@given(NUMBERS, SEEDS)
def test_it_is_the_correlation_of_mean_ranks(x: np.ndarray[Any, Any], seed: int) -> None:
    y = np.random.default_rng(seed).integers(-2, 3, len(x))
    right = slow_spearman(x.tolist(), y.tolist())
    np.testing.assert_allclose(spearman(x, y), right, atol=1e-12)
    np.testing.assert_allclose(spearman(y, x), right, atol=1e-12)
    np.testing.assert_allclose(spearman(-x, y), -right, atol=1e-12)
    np.testing.assert_allclose(spearman(np.exp(x), y), right, atol=1e-12)


# --- how figures are distributed


def test_a_spread_by_hand() -> None:
    found = Spread.of(np.array([5.0, np.nan, 1, 2, 3, 4]))
    assert (found.least, found.median, found.mean, found.least_at) == (1, 3, 3, 2)
    assert (found.p5, found.p1) == (pytest.approx(1.2), pytest.approx(1.04))
