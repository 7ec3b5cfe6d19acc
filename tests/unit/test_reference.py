"""The golden texts: KaLM's vectors pass, and each way for them to be another's is found."""

from __future__ import annotations

import re
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kalm import BF16, FP8, KalmTransport, turned, vectors_of

from kalm_integrations import KalmClient, golden
from kalm_integrations.profiles import EMBEDDED, KALM
from modal_backend.engines.embedded import EmbeddedEngine

RIGHT = vectors_of(golden.TEXTS)
PAIRS = len(golden.PAIRS)
ENDS = (0, 1, 2, 3837, 3838, 3839)
ROWS = st.integers(0, len(golden.TEXTS) - 1)
PUBLISHED = (2 * PAIRS, 2 * PAIRS + 1)
PUBLISHED_ROWS = st.sampled_from(PUBLISHED)
SEEDS = st.integers(0, 2**32 - 1)


def wrong(vectors, quantization="bf16"):
    return golden.judge(vectors, quantization).wrong


def changed(row, column, value):
    vectors = RIGHT.copy()
    vectors[row, column] = value
    return vectors


# -- the texts ---------------------------------------------------------------------------------
def test_the_texts_are_to_the_byte_what_kalm_reads():
    assert golden.TEXTS[0] == (
        "Instruct: Given a query, retrieve documents that answer the query \nQuery: How tall is K2?"
    )
    assert golden.TEXTS[PAIRS:-2] == tuple(pair.answer for pair in golden.PAIRS[::-1])
    assert golden.TEXTS[-2:] == (
        "Instruct: Classifying the category of french news.\nQuery:This is an example sentence",
        "Instruct: Classifying the category of french news.\nQuery:Each sentence is converted",
    )
    assert len(set(golden.TEXTS)) == len(golden.TEXTS) == 2 * PAIRS + 2


def test_they_are_in_several_languages_and_across_languages():
    within = [pair for pair in golden.PAIRS if " and " not in pair.languages]
    assert len(within) >= 3
    assert len(golden.PAIRS) - len(within) >= 3


def test_published_values_are_those_of_bf16():
    """A misread digit would be none of bf16's values, to the eight decimals that were printed."""
    for published in golden.PUBLISHED:
        values = np.array(published.first + published.last, dtype=np.float32)
        bits = values.view(np.uint32)
        nearest = ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        assert np.abs(nearest - values).max() < 1e-8


async def test_a_small_real_model_finds_each_answer():
    """So the pairs mean something, and another model's vectors are not those published."""
    engine = EmbeddedEngine.load()
    questions = [pair.question for pair in golden.PAIRS]  # it knows no instructions
    try:
        output = await engine.embed(
            [*questions, *golden.TEXTS[PAIRS:]], role="query", truncate="error", deadline=None
        )
    finally:
        await engine.close()
    padded = np.zeros_like(RIGHT)
    padded[:, : output.vectors.shape[1]] = output.vectors
    assert not wrong(padded, None)
    assert len(wrong(padded, "bf16")) == 2


def test_they_are_kalms_only():
    assert golden.applies_to(BF16)
    assert golden.applies_to(FP8)
    assert golden.applies_to(KALM.space)
    assert not golden.applies_to(EMBEDDED.space)


# -- what passes -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("quantization", "made"),
    [
        ("bf16", ("order of 6 pairs", "published values of 2 texts")),
        ("fp8", ("order of 6 pairs",)),
        (None, ("order of 6 pairs",)),
    ],
)
def test_right_vectors_pass(quantization, made):
    verdict = golden.judge(RIGHT, quantization)
    assert verdict == golden.Verdict(made, ())
    assert str(verdict) == f"{', '.join(made)}: as they should be"


def test_vectors_that_travelled_as_float16_pass():
    assert not wrong(RIGHT.astype(np.float16).astype(np.float32))


@given(seed=SEEDS)
def test_other_kernels_may_round_otherwise(seed):
    assert not wrong(turned(RIGHT, 0.9999, seed))


@given(row=PUBLISHED_ROWS, off=st.lists(st.floats(-1.99e-3, 1.99e-3), min_size=6, max_size=6))
def test_values_within_the_tolerance_pass(row, off):
    assert not wrong(changed(row, ENDS, RIGHT[row, ENDS] + np.float32(off)))


# -- what does not -----------------------------------------------------------------------------
@given(
    row=PUBLISHED_ROWS,
    column=st.sampled_from(ENDS),
    off=st.floats(2.1e-3, 0.02),
    sign=st.sampled_from([1, -1]),
)
def test_a_value_beyond_it_is_found(row, column, off, sign):
    vectors = changed(row, column, RIGHT[row, column] + sign * off)
    vectors[row] /= np.linalg.norm(vectors[row])
    (found,) = wrong(vectors)
    assert found.startswith(repr(golden.PUBLISHED[row - 2 * PAIRS].sentence))
    assert not wrong(vectors, "fp8")


@given(row=PUBLISHED_ROWS, column=st.sampled_from(ENDS))
def test_a_value_of_the_other_sign_is_found(row, column):
    assert len(wrong(changed(row, column, -RIGHT[row, column]))) == 1


@given(row=PUBLISHED_ROWS, columns=st.sampled_from(list(combinations(ENDS, 2))))
def test_values_in_each_others_place_are_found(row, columns):
    vectors = RIGHT.copy()
    vectors[row, columns] = RIGHT[row, columns[::-1]]
    apart = abs(RIGHT[row, columns[0]] - RIGHT[row, columns[1]]) > golden.TOLERANCE
    assert len(wrong(vectors)) == apart


@pytest.mark.parametrize(
    ("rows", "quantization"),
    [
        *((rows, None) for rows in combinations(range(PAIRS), 2)),
        *((rows, None) for rows in combinations(range(PAIRS, 2 * PAIRS), 2)),
        *((rows, "bf16") for rows in product(range(2 * PAIRS), PUBLISHED)),
        (PUBLISHED, "bf16"),
    ],
)
def test_vectors_in_each_others_place_are_found(rows, quantization):
    vectors = RIGHT.copy()
    vectors[list(rows)] = RIGHT[list(rows[::-1])]
    assert wrong(vectors, quantization)


@pytest.mark.parametrize("places", [-3, -2, -1, 1, 2, 3])
@pytest.mark.parametrize("quantization", ["bf16", "fp8"])
def test_vectors_that_are_all_a_few_places_aside_are_found(places, quantization):
    assert wrong(np.roll(RIGHT, places, axis=0), quantization)


@given(row=ROWS, column=st.integers(0, golden.DIMENSIONS - 1))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantization", ["bf16", "fp8", None])
def test_what_is_no_number_is_found(row, column, value, quantization):
    (found,) = wrong(changed(row, column, value), quantization)
    assert repr(golden.TEXTS[row]) in found


@given(seed=SEEDS, cosine=st.floats(0, 0.9))
def test_another_model_is_found_by_the_published_values(seed, cosine):
    """Such as wrong pooling, a wrong prompt or a missing token at the start make of it."""
    other = RIGHT.copy()
    other[2 * PAIRS :] = turned(RIGHT, cosine, seed)[2 * PAIRS :]
    assert len(wrong(other)) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda v: -v,
        lambda v: v[:, ::-1],
        lambda v: np.roll(v, 1, axis=1),
        lambda v: v[::-1],
        lambda v: np.repeat(v[:1], len(v), axis=0),
    ],
    ids=["negated", "reversed", "a value aside", "last first", "all the same"],
)
def test_vectors_wrong_as_a_whole_are_found(spoil):
    assert wrong(spoil(RIGHT))


def test_being_as_near_as_another_answer_is_not_enough():
    assert len(wrong(np.repeat(RIGHT[:1], len(RIGHT), axis=0), "fp8")) == PAIRS


@pytest.mark.parametrize("row", range(PAIRS))
@pytest.mark.parametrize("quantization", ["bf16", "fp8", None])
def test_a_question_that_is_nearer_to_another_answer_is_named(row, quantization):
    other = (row + 1) % PAIRS
    vectors = RIGHT.copy()
    vectors[row] = turned(vectors_of([golden.PAIRS[other].answer]), 0.8)[0]
    (found,) = wrong(vectors, quantization)
    pair = golden.PAIRS[row]
    said = rf"{re.escape(repr(pair.question))} \({pair.languages}\) has cosine (\S+) to its answer "
    match = re.fullmatch(said + rf"and 0\.800 to '{golden.PAIRS[other].answer}'", found)
    assert match
    assert float(match[1]) < 0.8


def test_values_are_named_beside_the_published_ones():
    verdict = golden.judge(changed(2 * PAIRS, 0, 0.05), "bf16")
    assert str(verdict) == (
        "'This is an example sentence' has [0.0500, 0.0232, 0.0028 … -0.0208, 0.0020, -0.0703] "
        "instead of the published [-0.0187, 0.0232, 0.0028 … -0.0208, 0.0020, -0.0703], off by up "
        "to 0.0687"
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda v: v[:-1],
        lambda v: v[:, :2048] / np.linalg.norm(v[:, :2048], axis=1, keepdims=True),
        lambda v: v.ravel(),
        lambda v: v * np.float32(1.01),
        lambda v: v * 0,
    ],
    ids=["one too few", "cut", "flat", "longer", "nothing"],
)
@pytest.mark.parametrize("quantization", ["bf16", "fp8"])
def test_what_has_not_the_right_form_is_found(spoil, quantization):
    assert len(wrong(spoil(RIGHT), quantization)) == 1


# -- asking a service --------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dimensions": 64, "vector_dtype": "float16", "batch_size": 3},
        {"document_instruction": "Given a ticket, find its solution"},
        {"query_instruction": "sts", "show_progress": True},
    ],
    ids=["none", "cut", "instructed", "symmetric"],
)
def test_they_are_asked_for_whatever_the_client_adds_and_cuts(monkeypatch, capfd, settings):
    transport = KalmTransport()
    monkeypatch.setattr("kalm_integrations.session.open_transport", lambda _: transport)
    client = KalmClient(base_url="http://kalm.invalid", expected_identity=BF16, **settings)
    assert np.array_equal(golden.ask(client), RIGHT)
    assert tuple(transport.sent) == golden.TEXTS
    assert {(asked.dimensions, asked.dtype) for asked in transport.requests} == {(None, "float32")}
    assert transport.closed == 1
    assert capfd.readouterr().err == ""
