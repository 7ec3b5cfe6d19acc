"""Texts become requests and answers go back to their places, whatever the texts and the limits."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_integrations.batching import Batch, RequestLimits, estimate_tokens, plan
from kalm_integrations.errors import InvalidText
from kalm_integrations.prompts import AS_IS
from kalm_integrations.result import Usage

TEMPLATE = "q: {text}."
# Few enough values that copies are common; long and multi-byte enough that every limit binds.
TEXTS = st.lists(
    st.sampled_from(["a", "b", "{text}", "ü", "语言模型", "x" * 50]) | st.text(max_size=20),
    max_size=40,
)
LIMITS = st.builds(
    RequestLimits,
    texts=st.integers(1, 6),
    bytes=st.integers(1, 120),
    tokens=st.integers(1, 30),
    text_tokens=st.integers(1, 12),
)
CASES = given(texts=TEXTS, limits=LIMITS)


def vector(text: str) -> list[float]:
    """As good as a model: a text has one vector, and no other text has it."""
    return list(hashlib.sha256(text.encode()).digest())


def cost(texts: list[str], limits: RequestLimits) -> tuple[int, int, int]:
    """What the limits are compared with."""
    sizes = [len(text.encode()) for text in texts]
    return len(texts), sum(sizes), sum(min(size // 4 + 1, limits.text_tokens) for size in sizes)


def fits(texts: list[str], limits: RequestLimits) -> bool:
    allowed = (limits.texts, limits.bytes, limits.tokens)
    return all(used <= most for used, most in zip(cost(texts, limits), allowed, strict=True))


@CASES
def test_every_index_is_in_exactly_one_batch(texts, limits):
    batches = plan(enumerate(texts), TEMPLATE, limits)
    indices = [index for batch in batches for places in batch.positions for index in places]
    assert sorted(indices) == list(range(len(texts)))


@CASES
def test_requests_contain_the_callers_texts_with_the_instruction(texts, limits):
    for batch in plan(enumerate(texts), TEMPLATE, limits):
        for prompted, places in zip(batch.texts, batch.positions, strict=True):
            assert {f"q: {texts[index]}." for index in places} == {prompted}


@CASES
def test_each_distinct_text_is_sent_once_in_the_callers_order(texts, limits):
    batches = list(plan(enumerate(texts), AS_IS, limits))
    assert [text for batch in batches for text in batch.texts] == list(dict.fromkeys(texts))
    assert all(places == sorted(places) for batch in batches for places in batch.positions)


@CASES
def test_no_request_exceeds_a_limit_except_one_of_a_single_text(texts, limits):
    for batch in plan(enumerate(texts), TEMPLATE, limits):
        assert len(batch) == 1 or fits(batch.texts, limits)


@CASES
def test_requests_are_as_full_as_the_limits_allow(texts, limits):
    batches = list(plan(enumerate(texts), TEMPLATE, limits))
    assert all(batch.texts for batch in batches)
    for batch, following in pairwise(batches):
        assert not fits([*batch.texts, following.texts[0]], limits)


@CASES
def test_scatter_puts_each_vector_at_every_index_of_its_text(texts, limits):
    answer = np.full((len(texts), 32), np.nan, dtype=np.float32)
    for batch in plan(enumerate(texts), AS_IS, limits):
        vectors = np.array([vector(text) for text in batch.texts], dtype=np.float32)
        part = batch.scatter(vectors, Usage())
        assert part.indices.dtype == np.int64
        assert part.packed.dtype == vectors.dtype
        answer[part.indices] = part.packed
    assert answer.tolist() == [vector(text) for text in texts]


def test_scatter_of_distinct_texts_copies_nothing():
    vectors = np.eye(2, dtype=np.float16)
    assert Batch(["a", "b"], [[0], [1]]).scatter(vectors, Usage()).packed is vectors


def test_indices_need_not_be_consecutive():
    (batch,) = plan([(7, "a"), (9, "b"), (12, "a")], AS_IS, RequestLimits())
    assert batch == Batch(["a", "b"], [[7, 12], [9]])


def test_an_empty_list_needs_no_request():
    assert list(plan([], AS_IS, RequestLimits())) == []


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        (RequestLimits(texts=2), [2, 2, 1]),
        (RequestLimits(bytes=18), [2, 2, 1]),  # 3 characters, 9 bytes of UTF-8 each
        (RequestLimits(tokens=9), [3, 2]),  # 9 // 4 + 1 = 3 tokens each
        (RequestLimits(tokens=9, text_tokens=2), [4, 1]),
        (RequestLimits(bytes=1, tokens=1), [1, 1, 1, 1, 1]),
    ],
)
def test_each_limit_alone_closes_a_request(limits, sizes):
    texts = [f"语言{character}" for character in "模型向量图"]
    assert [len(batch) for batch in plan(enumerate(texts), AS_IS, limits)] == sizes


def test_the_instruction_counts_towards_the_limits():
    texts = ["a", "b", "c", "d"]
    bare, instructed = (
        [len(batch) for batch in plan(enumerate(texts), template, RequestLimits(bytes=8))]
        for template in (AS_IS, "to: {text}")
    )
    assert bare == [4]
    assert instructed == [1, 1, 1, 1]


@pytest.mark.parametrize(("utf8_bytes", "tokens"), [(0, 1), (3, 1), (4, 2), (400, 101)])
def test_tokens_are_estimated_at_four_bytes_each(utf8_bytes, tokens):
    assert estimate_tokens(utf8_bytes) == tokens


@given(texts=st.lists(st.text(), min_size=2, unique=True))
def test_halves_together_contain_the_whole_batch(texts):
    positions = [[index, index + 100] for index in range(len(texts))]
    first, second = Batch(texts, positions).halves()
    assert first.texts + second.texts == texts
    assert first.positions + second.positions == positions
    assert len(first) in (len(second), len(second) - 1)


@given(texts=st.lists(st.text(), unique=True), dropped=st.sets(st.integers(0, 20)))
def test_without_drops_rows_and_keeps_the_positions_of_others(texts, dropped):
    rest = Batch(texts, [[index] for index in range(len(texts))]).without(iter(dropped))
    kept = [row for row in range(len(texts)) if row not in dropped]
    assert rest == Batch([texts[row] for row in kept], [[row] for row in kept])


def test_locate_names_every_copy_of_an_invalid_text_in_order():
    batch = Batch(["a", "b", "c"], [[4, 9], [5], [1, 6]])
    refused = [InvalidText(0, "is long"), InvalidText(2, "is odd")]
    assert batch.locate(refused) == [
        InvalidText(1, "is odd"),
        InvalidText(4, "is long"),
        InvalidText(6, "is odd"),
        InvalidText(9, "is long"),
    ]
