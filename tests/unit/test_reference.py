"""KaLM's vectors of the reference texts pass, rounding errors included; wrong vectors fail."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kalm import BF16, FP8, KalmTransport, similar, turned, vectors_of

from kalm_integrations import KalmClient, reference
from kalm_integrations.models import EMBEDDED, KALM
from modal_backend.engines.embedded import EmbeddedEngine

RIGHT = vectors_of(reference.TEXTS)
PAIRS = len(reference.PAIRS)
QUANTIZATIONS = [BF16.quantization, FP8.quantization, "int4 of the future", None]
NOISE = 0.99986
"""Cosine of two runs of one text in bf16, with the real weights."""
ENDS = (0, 1, 2, 3837, 3838, 3839)
ROWS = st.integers(0, len(reference.TEXTS) - 1)
PUBLISHED = (2 * PAIRS, 2 * PAIRS + 1)


def wrong(vectors, quantization="bf16"):
    return reference.judge(vectors, quantization).failures


def failed(vectors, quantization="bf16"):
    """The names of the checks that fail."""
    return {failure.partition(":")[0] for failure in wrong(vectors, quantization)}


def off(*differences):
    """Right vectors, but for (place, difference) of published values, the first text's first."""
    vectors = RIGHT.copy()
    for place, difference in differences:
        vectors[PUBLISHED[place // 6], ENDS[place % 6]] += np.float32(difference)
    return vectors


def with_similarity(number, difference):
    return np.vstack([RIGHT[:-4], similar(number, difference)]).astype(np.float32)


def changed(row, column, value):
    vectors = RIGHT.copy()
    vectors[row, column] = value
    return vectors


# -- the texts ---------------------------------------------------------------------------------
def test_the_texts_contain_kalms_instructions_byte_for_byte():
    assert reference.TEXTS[0] == (
        "Instruct: Given a query, retrieve documents that answer the query \nQuery: How tall is K2?"
    )
    assert reference.TEXTS[PAIRS:-6] == tuple(pair.answer for pair in reference.PAIRS[::-1])
    assert reference.TEXTS[-6:-4] == (
        "Instruct: Classifying the category of french news.\nQuery:This is an example sentence",
        "Instruct: Classifying the category of french news.\nQuery:Each sentence is converted",
    )
    pairs = [(pair.first, pair.second) for pair in reference.SIMILARITIES]
    assert sorted(pairs) == sorted(
        pair if pair in pairs else pair[::-1] for pair in combinations(reference.TEXTS[-4:], 2)
    )
    assert len(set(reference.TEXTS)) == len(reference.TEXTS) == 2 * PAIRS + 6


def test_pairs_are_within_and_across_languages():
    within = [pair for pair in reference.PAIRS if " and " not in pair.languages]
    assert len(within) >= 3
    assert len(reference.PAIRS) - len(within) >= 3


def test_published_values_are_exact_in_bf16():
    """A misread digit would be none of bf16's values, to the eight decimals that were printed."""
    for published in reference.PUBLISHED:
        values = np.array(published.first + published.last, dtype=np.float32)
        bits = values.view(np.uint32)
        nearest = ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        assert np.abs(nearest - values).max() < 1e-8


async def test_the_embedded_engine_passes_only_the_check_of_order():
    """So the pairs mean something, and another model's vectors are not those published."""
    engine = EmbeddedEngine.load()
    questions = [pair.question for pair in reference.PAIRS]  # it knows no instructions
    try:
        output = await engine.embed(
            [*questions, *reference.TEXTS[PAIRS:]], role="query", truncate="error", deadline=None
        )
    finally:
        await engine.close()
    padded = np.zeros_like(RIGHT)
    padded[:, : output.vectors.shape[1]] = output.vectors
    for quantization in QUANTIZATIONS:
        assert failed(padded, quantization) == {"published values", "published similarities"}


def test_the_checks_apply_to_kalm_only():
    assert reference.applies_to(BF16)
    assert reference.applies_to(FP8)
    assert reference.applies_to(KALM.space)
    assert not reference.applies_to(EMBEDDED.space)


# -- what passes -------------------------------------------------------------------------------
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_published_vectors_pass(quantization):
    verdict = reference.judge(RIGHT, quantization)
    assert verdict.failures == ()
    assert [check.partition(" (")[0] for check in verdict.checks] == [
        "order of 6 pairs",
        "12 published values",
        "6 published similarities",
    ]
    published = [pair.cosine for pair in reference.SIMILARITIES]
    assert verdict.similarities == pytest.approx(published, abs=1e-6)
    assert all(f"{cosine:.3f} ({cosine:.3f})" in str(verdict) for cosine in published)


def test_vectors_rounded_to_float16_pass():
    assert not wrong(RIGHT.astype(np.float16).astype(np.float32))


def test_rounding_errors_of_bf16_and_fp8_pass():
    """Of bf16, of twice as much noise, and of fp8, where they are typical and where large."""
    for seed in range(100):
        assert not wrong(turned(RIGHT, NOISE, seed))
        assert not wrong(turned(RIGHT, 0.9995, seed))
        assert not wrong(turned(RIGHT, 0.997, seed), FP8.quantization)
    large = [wrong(turned(RIGHT, 0.988, seed), FP8.quantization) for seed in range(100)]
    assert sum(not failures for failures in large) >= 97  # 0.999 are expected


def test_errors_proportional_to_the_values_pass():
    """Real models round so, and the published values are larger than most."""
    random = np.random.default_rng(0)
    values = np.array([value for row in PUBLISHED for value in RIGHT[row, ENDS]])
    size = np.sqrt(2 * (1 - NOISE) * (values**2 + 1 / RIGHT.shape[1]) / 2)
    noise = random.normal(size=(200, 12)) * size
    accepted = [not wrong(off(*enumerate(differences))) for differences in noise]
    assert sum(accepted) >= 199


@pytest.mark.parametrize(
    ("quantization", "most"), [("bf16", (1.99e-3, 5.9e-3)), (FP8.quantization, (5.9e-3, 11.9e-3))]
)
@given(data=st.data())
def test_values_within_the_tolerance_and_two_outliers_pass(quantization, most, data):
    near, far = (st.floats(-limit, limit) for limit in most)
    differences = data.draw(st.lists(near, min_size=12, max_size=12))
    for place in data.draw(st.lists(st.integers(0, 11), max_size=2)):
        differences[place] = data.draw(far)
    assert not wrong(off(*enumerate(differences)), quantization)


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("difference", "fails"),
    [(0.019, []), (0.03, ["bf16"]), (0.049, ["bf16"]), (0.06, QUANTIZATIONS)],
)
def test_a_similarity_passes_within_the_tolerance(number, sign, difference, fails):
    vectors = with_similarity(number, sign * difference)
    for quantization in QUANTIZATIONS:
        expected = {"published similarities"} if quantization in fails else set()
        assert failed(vectors, quantization) == expected


# -- what fails ---------------------------------------------------------------------------------
@given(place=st.integers(0, 11), far=st.floats(0, 0.02), sign=st.sampled_from([1, -1]))
def test_a_value_beyond_the_limit_for_outliers_fails(place, far, sign):
    for quantization, limit in (("bf16", 6.1e-3), (FP8.quantization, 12.1e-3)):
        vectors = off((place, sign * (limit + far)))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        assert failed(vectors, quantization) == {"published values"}


@given(places=st.sets(st.integers(0, 11), min_size=3), far=st.floats(2.1e-3, 5e-3))
def test_more_than_two_outliers_fail(places, far):
    vectors = off(*((place, far) for place in places))
    assert failed(vectors) == {"published values"}
    assert not failed(vectors, FP8.quantization)
    assert failed(off(*((place, 3 * far) for place in places)), FP8.quantization)


@pytest.mark.parametrize("column", ENDS)
@pytest.mark.parametrize("row", PUBLISHED)
def test_a_value_with_the_opposite_sign_fails(row, column):
    value = RIGHT[row, column]
    assert bool(wrong(changed(row, column, -value))) == (2 * abs(value) > 6e-3)


@pytest.mark.parametrize("row", PUBLISHED)
@pytest.mark.parametrize("columns", list(combinations(ENDS, 2)))
def test_swapped_values_fail(row, columns):
    vectors = RIGHT.copy()
    vectors[row, columns] = RIGHT[row, columns[::-1]]
    apart = abs(RIGHT[row, columns[0]] - RIGHT[row, columns[1]])
    assert bool(wrong(vectors)) == (apart > 6e-3)


@pytest.mark.parametrize("rows", list(combinations(range(-4, 0), 2)))
def test_swapped_vectors_of_similar_texts_fail(rows):
    vectors = RIGHT.copy()
    vectors[list(rows)] = RIGHT[list(rows[::-1])]
    assert failed(vectors) == {"published similarities"}


@pytest.mark.parametrize("cosine", [0.908, 0.8, 0.5])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_distant_vectors_fail(quantization, cosine):
    """0.908 is mean pooling's."""
    for seed in range(8):
        vectors = turned(RIGHT, cosine, seed)
        assert "published similarities" in failed(vectors, quantization)
        if quantization == "bf16":
            assert "published values" in failed(vectors, quantization)


def test_vectors_of_mean_pooling_fail_the_check_of_values():
    """An error that all texts share moves the similarities less."""
    caught = dict.fromkeys(("bf16", FP8.quantization), 0)
    for seed in range(100):
        vectors = np.vstack([RIGHT[:-6], turned(RIGHT, 0.908, seed)[-6:-4], RIGHT[-4:]])
        for quantization in caught:
            caught[quantization] += "published values" in failed(vectors, quantization)
    assert caught["bf16"] == 100
    assert caught[FP8.quantization] >= 85  # 0.93 are expected


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_missing_instruction_fails(quantization):
    vectors = RIGHT.copy()
    vectors[list(PUBLISHED)] = vectors_of([text.sentence for text in reference.PUBLISHED])
    assert failed(vectors, quantization) == {"published values"}


@pytest.mark.parametrize(
    ("rows", "quantization"),
    [
        *((rows, None) for rows in combinations(range(PAIRS), 2)),
        *((rows, None) for rows in combinations(range(PAIRS, 2 * PAIRS), 2)),
        *((rows, None) for rows in product(range(2 * PAIRS), PUBLISHED)),
        *((PUBLISHED, quantization) for quantization in QUANTIZATIONS),
    ],
)
def test_swapped_vectors_fail(rows, quantization):
    vectors = RIGHT.copy()
    vectors[list(rows)] = RIGHT[list(rows[::-1])]
    assert wrong(vectors, quantization)


@pytest.mark.parametrize("places", [-3, -2, -1, 1, 2, 3])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_shifted_vectors_fail(places, quantization):
    assert wrong(np.roll(RIGHT, places, axis=0), quantization)


@given(row=ROWS, column=st.integers(0, reference.DIMENSIONS - 1))
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_values_that_are_not_finite_fail(row, column, value):
    (failure,) = wrong(changed(row, column, value))
    assert repr(reference.TEXTS[row]) in failure


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
def test_vectors_that_are_all_wrong_fail(spoil):
    assert wrong(spoil(RIGHT))


def test_equally_near_answers_fail():
    failures = wrong(np.repeat(RIGHT[:1], len(RIGHT), axis=0))
    assert sum(failure.startswith("order:") for failure in failures) == PAIRS


@pytest.mark.parametrize("row", range(PAIRS))
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_question_nearer_to_another_answer_is_named(row, quantization):
    other = (row + 1) % PAIRS
    vectors = RIGHT.copy()
    vectors[row] = turned(vectors_of([reference.PAIRS[other].answer]), 0.8)[0]
    (failure,) = wrong(vectors, quantization)
    pair = reference.PAIRS[row]
    assert failure.startswith(f"order: {pair.question!r} ({pair.languages})")
    assert f"0.800 to {reference.PAIRS[other].answer!r}" in failure


def test_failures_name_the_actual_and_the_expected_values():
    (failure,) = wrong(changed(2 * PAIRS, 0, 0.05))
    assert "1 of 12" in failure
    assert "0.0687" in failure
    actual, published = "[0.0500, 0.0232, 0.0028", "[-0.0187, 0.0232, 0.0028"
    assert failure.index("'This is an example sentence'") < failure.index(actual)
    assert failure.index(actual) < failure.index(published)
    verdict = reference.judge(with_similarity(1, -0.06), None)
    (failure,) = verdict.failures
    assert "1 of 6" in failure
    assert "0.6713 instead of 0.7313" in failure
    assert all(repr(text) in failure for text in ("Explain gravity", reference.TEXTS[-1]))
    assert "0.671 (0.731)" in str(verdict)
    assert verdict.similarities[1] == pytest.approx(0.6713, abs=1e-4)


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
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_vectors_of_wrong_shape_or_length_fail(spoil, quantization):
    assert len(wrong(spoil(RIGHT), quantization)) == 1


# -- a service ---------------------------------------------------------------------------------
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
def test_reference_texts_ignore_the_options_of_the_client(monkeypatch, capfd, settings):
    transport = KalmTransport()
    monkeypatch.setattr("kalm_integrations.dispatch.open_transport", lambda _: transport)
    client = KalmClient(base_url="http://kalm.invalid", expected_identity=BF16, **settings)
    assert np.array_equal(reference.embed(client), RIGHT)
    assert tuple(transport.sent) == reference.TEXTS
    assert {(sent.dimensions, sent.dtype) for sent in transport.requests} == {(None, "float32")}
    assert transport.closed == 1
    assert capfd.readouterr().err == ""
