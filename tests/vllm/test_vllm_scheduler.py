"""The size of a step: a query waits for few tokens of documents."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modal_backend.engines.vllm.scheduler import step_for

STEP, FILL = 2048, 512
QUERIES = st.lists(st.integers(1, 3000), min_size=1, max_size=80)
BEGUN = st.integers(0, 40)


@given(BEGUN)
def test_steps_without_queries_are_full(begun: int) -> None:
    assert step_for([], begun, STEP, FILL) == (STEP, 0)


@pytest.mark.parametrize(
    ("queries", "begun", "expected"),
    [
        ([24], 0, (512, 0)),  # filled up with documents that wait
        ([24], 1, (512, 488)),  # filled up with the one that was begun
        ([24], 2, (512, 244)),
        ([24] * 30, 0, (720, 0)),  # all queries that wait
        ([24] * 30, 1, (744, 24)),
        ([600], 1, (1200, 600)),  # a text may have as much as the longest query needs
        ([3000], 1, (2048, 1024)),  # half of the step is the queries'
        ([24] * 200, 1, (2048, 24)),
    ],
)
def test_steps_with_queries_are_small(
    queries: list[int], begun: int, expected: tuple[int, int]
) -> None:
    assert step_for(queries, begun, STEP, FILL) == expected


@given(QUERIES, BEGUN)
def test_queries_get_at_least_half_of_a_step(queries: list[int], begun: int) -> None:
    step, share = step_for(queries, begun, STEP, FILL)
    assert 0 < step <= STEP
    assert share >= 0
    left_for_queries = step - begun * share
    assert left_for_queries >= min(sum(queries), STEP // 2)


@given(st.lists(st.integers(1, 512), min_size=1, max_size=2), st.integers(0, 1))
def test_a_short_query_fits_into_one_step(queries: list[int], begun: int) -> None:
    step, share = step_for(queries, begun, STEP, FILL)
    assert not share or share >= max(queries)
    assert step - begun * share >= sum(queries)


@given(QUERIES, BEGUN, st.integers(1, 4096), st.integers(1, 512))
def test_every_step_has_at_least_one_token_and_at_most_the_maximum(
    queries: list[int], begun: int, step: int, fill: int
) -> None:
    size, _ = step_for(queries, begun, step, fill)
    assert 1 <= size <= step
