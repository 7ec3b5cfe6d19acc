"""Search, agreement and statistics of `kalm eval`, on vectors and values made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kalm_integrations.evaluation.compare import agreement, distribution
from kalm_integrations.evaluation.retrieval import summarize
from kalm_integrations.evaluation.texts import Texts, search

NONE = np.array([-1])


def at(*degrees: float) -> np.ndarray:
    """Unit vectors in the plane."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def rows(nearest: list[np.ndarray]) -> list[list[int]]:
    return [each.tolist() for each in nearest]


class TestSearch:
    def test_the_nearest_documents_come_first(self) -> None:
        assert rows(search(at(0), at(50, 10, -20, 90), 3, NONE)) == [[1, 2, 0]]

    def test_equally_near_documents_are_ordered_by_their_row(self) -> None:
        noise = 1e-5  # degrees: finer than the transfer in float16
        assert rows(search(at(0), at(40 + noise, 40, 20, -40), 3, NONE)) == [[2, 0, 1]]

    def test_a_querys_own_document_is_left_out(self) -> None:
        nearest = search(at(0, 10), at(0, 10, 20), 2, np.array([0, -1]))
        assert rows(nearest) == [[1, 2], [1, 0]]
        assert rows(search(at(0), at(0, 10, 20), 9, np.array([0]))) == [[1, 2]]

    def test_many_queries_are_searched_for_in_blocks(self) -> None:
        rng = np.random.default_rng(0)
        queries, documents = rng.normal(size=(200, 8)), rng.normal(size=(50, 8))
        nearest = search(queries, documents, 50, np.full(200, -1))
        assert (np.array(nearest) == np.argsort(-(queries @ documents.T), axis=1)).all()


class TestAgreement:
    def test_overlap_counts_shared_documents_and_correlation_their_order(self) -> None:
        documents = [at(10, 20, 30, 40), at(20, 10, 30, 40)]
        values = agreement([at(0), at(0)], documents, NONE, [1, 2], 4)
        assert values["overlap@1"].tolist() == [0]
        assert values["overlap@2"].tolist() == [1]
        assert values["rank correlation@4"] == pytest.approx([0.8])  # 1 - 6 * 2 / (4 * 15)

    def test_the_opposite_order_has_correlation_minus_1(self) -> None:
        documents = [at(10, 20, 30), at(30, 20, 10)]
        values = agreement([at(0), at(0)], documents, NONE, [1], 3)
        assert values["rank correlation@3"] == pytest.approx([-1])

    def test_each_system_searches_its_own_documents(self) -> None:
        """A rotation of one system's space changes nothing."""
        documents = [at(10, 20, 30), at(100, 110, 120)]
        values = agreement([at(0), at(90)], documents, NONE, [1, 2], 3)
        assert [each.tolist() for each in values.values()] == [[1], [1], pytest.approx([1])]

    def test_equally_near_documents_have_no_correlation(self) -> None:
        values = agreement([at(0), at(0)], [at(10, 20), at(30, -30)], NONE, [1], 2)
        assert np.isnan(values["rank correlation@2"]).all()

    def test_a_distribution_names_the_lowest_value_and_skips_undefined_ones(self) -> None:
        texts = Texts(["a", "b", "c", "d"], ["line 1", "line 2", "line 3", "line 4"])
        figures = distribution(np.array([0.5, np.nan, 0.1, 0.9]), texts)
        assert (figures["lowest"], figures["lowest_at"]) == (0.1, "line 3")
        assert figures["mean"] == pytest.approx(0.5)
        assert distribution(np.array([np.nan]), texts) == {}


class TestSummary:
    def test_intervals_shrink_with_the_number_of_queries(self) -> None:
        rng = np.random.default_rng(0)

        def width(queries: int) -> float:
            figure = summarize({"nDCG@10": rng.random((1, queries))})[0]["nDCG@10"]
            assert figure["low"] < figure["mean"] < figure["high"]
            return float(figure["high"] - figure["low"])

        assert width(400) == pytest.approx(2 * 1.96 * np.sqrt(1 / 12 / 400), rel=0.15)
        assert width(25) > 3 * width(400)

    def test_pairs_find_a_difference_that_is_small_against_the_spread(self) -> None:
        base = np.random.default_rng(0).random(100)
        shift = np.random.default_rng(1).normal(0.05, 0.02, 100)
        table = np.stack([base, base + shift])
        figure = summarize({"nDCG@10": table})[1]["nDCG@10"]
        assert figure["low"] < base.mean()  # the intervals of the two overlap
        assert figure["difference"]["low"] > 0
        assert figure["difference"]["p"] < 0.01

    def test_p_is_adjusted_for_the_number_of_systems(self) -> None:
        rng = np.random.default_rng(0)
        base, noise = rng.random(60), rng.normal(0, 0.2, (5, 60))
        better = base + rng.normal(0.05, 0.2, 60)

        def p(*others: np.ndarray) -> float:
            table = np.stack([base, better, *others])
            return float(summarize({"nDCG@10": table})[1]["nDCG@10"]["difference"]["p"])

        assert p(*(base + each for each in noise)) > p()
