"""The canary passes right vectors and detects each kind of wrong ones."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kalm import BF16, FP8, KalmEngine, similar
from kalm import turned as kalm_turned
from scripted import DIMENSIONS, vectors_of
from scripted_engine import ScriptedEngine

from kalm_integrations import prompts, reference
from kalm_integrations.errors import CanaryFailedError
from modal_backend import canary
from modal_backend.engines.embedded import EmbeddedEngine

RIGHT = vectors_of(canary.TEXTS, "float32")
INSTRUCTED = vectors_of([prompts.apply(prompts.RETRIEVAL, canary.TEXTS[0])], "float32")
ALONE = "texts in one batch do not have the vectors that they have alone"


def turned(vectors, cosine):
    """Unit vectors with this cosine to `vectors`, each turned in a direction of its own."""
    aside = vectors_of([f"aside {i}" for i in range(len(vectors))], "float32")
    aside -= np.einsum("ij,ij->i", aside, vectors)[:, None] * vectors
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    return (cosine * vectors + np.sqrt(1 - cosine**2) * aside).astype(np.float32)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def with_row(row, values):
    """Another vector in this place of a batch."""

    def spoil(vectors):
        vectors = vectors.copy()
        vectors[min(row, len(vectors) - 1)] = values
        return vectors

    return spoil


def with_text(number, values):
    """Another vector for this text of the canary, in a batch and alone."""

    def spoil(vectors):
        vectors = vectors.copy()
        vectors[(vectors == RIGHT[number]).all(axis=1)] = values
        return vectors

    return spoil


def in_a_batch(spoil):
    return lambda vectors: spoil(vectors) if len(vectors) > 1 else vectors


def only_the_instructed(spoil):
    return lambda vectors: spoil(vectors) if (vectors == INSTRUCTED).all() else vectors


# -- what passes -------------------------------------------------------------------------------
async def test_right_vectors_pass_and_are_returned_in_order():
    vectors = await canary.check(ScriptedEngine())
    assert np.array_equal(vectors, RIGHT)


async def test_the_embedded_engine_passes_twice_with_equal_vectors():
    engine = EmbeddedEngine.load()
    try:
        before = await canary.check(engine)
        assert np.array_equal(await canary.check(engine, before), before)
    finally:
        await engine.close()


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 6, 5]])
async def test_swapped_rows_of_the_embedded_engine_are_detected(order):
    engine = EmbeddedEngine.load()
    encode = engine._backend.encode
    engine._backend.encode = lambda ids: encode(ids)[order] if len(ids) > 1 else encode(ids)
    try:
        with pytest.raises(CanaryFailedError, match=ALONE):
            await canary.check(engine)
    finally:
        await engine.close()


async def test_rounding_differences_of_bf16_pass():
    """By as much as two computations of one text differ with real weights, and more."""
    rounded = turned(RIGHT, 0.9993)
    engine = ScriptedEngine(in_a_batch(lambda _: rounded))
    assert np.array_equal(await canary.check(engine, RIGHT), rounded)


@pytest.mark.parametrize(("cosine", "passes"), [(0.997, True), (0.995, False)])
async def test_fp8_has_a_larger_tolerance(cosine, passes):
    engine = ScriptedEngine(in_a_batch(lambda v: turned(v, cosine)))
    engine.identity = replace(engine.identity, quantization=FP8.quantization)
    if passes:
        await canary.check(engine)
    else:
        with pytest.raises(CanaryFailedError, match=ALONE):
            await canary.check(engine)


async def test_it_embeds_queries_without_a_deadline():
    engine = ScriptedEngine()
    await canary.check(engine)
    assert [how for _, how in engine.asked] == [
        {"role": "query", "truncate": "error", "deadline": None}
    ] * (len(canary.TEXTS) + 2)
    assert [texts for texts, _ in engine.asked] == [
        list(canary.TEXTS),
        *([text] for text in canary.TEXTS),
        [prompts.apply(prompts.RETRIEVAL, canary.TEXTS[0])],
    ]


def test_its_texts_differ_in_script_and_length():
    lengths = {len(text.encode()) for text in canary.TEXTS}
    assert len(lengths) == len(set(canary.TEXTS)) == len(canary.TEXTS)
    assert max(lengths) > 20 * min(lengths)
    assert sum(text.isascii() for text in canary.TEXTS) < len(canary.TEXTS)


# -- what does not -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda v: v[:-1], "vectors of shape (6, 512) instead of (7, 512)"),
        (lambda v: np.vstack([v, v[:1]]), "vectors of shape (8, 512) instead of (7, 512)"),
        (lambda v: v[:, :256], "vectors of shape (7, 256) instead of (7, 512)"),
        (lambda v: v.ravel(), "vectors of shape (3584,) instead of (7, 512)"),
        (with_row(3, np.nan), "1 of 7 texts; the first one got values that are not finite"),
        (with_row(6, np.inf), "values that are not finite"),
        (lambda v: v * 0, "7 of 7 texts; the first one got a vector of length 0.0000"),
        (lambda v: v * np.float32(1.003), "vector of length 1.0030"),
        (with_row(2, 0.0), "1 of 7 texts; the first one got a vector of length 0.0000"),
        (lambda v: v * 0 + RIGHT[0], "two different texts have one vector"),
        (
            with_text(5, RIGHT[1]),
            f"two different texts have one vector: {canary.TEXTS[1]!r} and {canary.TEXTS[5]!r} "
            "have cosine 1.00000, expected is at most 0.999",
        ),
        (with_text(5, turned(RIGHT[1:2], 0.9993)[0]), "two different texts have one vector"),
        (
            only_the_instructed(lambda _: RIGHT[:1]),
            f"an instruction does not change the vector of {canary.TEXTS[0]!r}: cosine 1.00000",
        ),
        (in_a_batch(lambda v: v[[1, 0, *range(2, 7)]]), ALONE),
        (in_a_batch(lambda v: v[[*range(5), 6, 5]]), ALONE),
        (in_a_batch(lambda v: v[::-1]), ALONE),
        (in_a_batch(lambda v: np.roll(v, 1, axis=0)), ALONE),
        (in_a_batch(lambda v: np.repeat(v[:1], len(v), axis=0)), ALONE),
        (
            in_a_batch(lambda v: turned(v, 0.998)),
            f"{ALONE}: cosine 0.99800 instead of at least 0.999",
        ),
        (in_a_batch(with_row(4, turned(RIGHT[4:5], 0.998)[0])), repr(canary.TEXTS[4])),
        (only_the_instructed(with_row(0, np.nan)), "values that are not finite"),
        (only_the_instructed(lambda v: v * 2), "vector of length 2.0000"),
        (only_the_instructed(lambda v: v[0]), "vectors of shape (512,) instead of (1, 512)"),
    ],
)
async def test_wrong_vectors_are_detected(spoil, found):
    with pytest.raises(CanaryFailedError, match=re.escape(found)):
        await canary.check(ScriptedEngine(spoil))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda v: v[:, ::-1],
        lambda v: -v,
        lambda v: unit(v + np.float32(0.07) * v[:, ::-1]),
        with_text(6, turned(RIGHT[6:], 0.998)),
    ],
    ids=["reversed", "negated", "a little off", "one of them a little off"],
)
async def test_vectors_that_differ_from_those_before_are_detected(spoil):
    engine = ScriptedEngine(spoil)
    await canary.check(engine)  # with nothing to compare with, they pass for right
    with pytest.raises(CanaryFailedError, match="not those of before the snapshot: cosine"):
        await canary.check(engine, RIGHT)


async def test_single_texts_are_compared_with_the_vectors_before():
    """Each step is within the tolerance, and both together are not."""
    engine = ScriptedEngine(lambda v: v if len(v) > 1 else turned(v, 0.9993))
    before = RIGHT - (turned(RIGHT, 0.9993) - RIGHT)
    before = unit(before)
    await canary.check(engine)
    await canary.check(ScriptedEngine(), before)
    with pytest.raises(CanaryFailedError, match="single texts do not have the vectors of before"):
        await canary.check(engine, before)


@given(row=st.integers(0, len(canary.TEXTS) - 1), seed=st.integers(0, 2**32 - 1))
async def test_any_replaced_vector_is_detected(row, seed):
    other = np.random.default_rng(seed).normal(size=DIMENSIONS).astype(np.float32)
    engine = ScriptedEngine(with_text(row, other / np.linalg.norm(other)))
    with pytest.raises(CanaryFailedError):
        await canary.check(engine, RIGHT)


async def test_errors_of_the_engine_are_not_translated():
    with pytest.raises(OSError, match="device lost"):
        await canary.check(ScriptedEngine(faults={"embed": OSError("device lost")}))


# -- of KaLM -----------------------------------------------------------------------------------
def reference_batch(spoil):
    return lambda vectors: spoil(vectors) if len(vectors) == len(reference.TEXTS) else vectors


REFERENCE_CHECKS = ["order of 6 pairs", "12 published values", "6 published similarities"]


@pytest.mark.parametrize(
    ("engine", "again", "checks"),
    [
        (ScriptedEngine(), False, []),
        (ScriptedEngine(), True, ["vectors of before"]),
        (KalmEngine(), True, ["vectors of before", *REFERENCE_CHECKS]),
        (KalmEngine(identity=FP8), False, REFERENCE_CHECKS),
    ],
    ids=["another model", "again", "bf16", "fp8"],
)
async def test_the_passed_checks_are_logged(engine, again, checks, caplog):
    before = await canary.check(engine) if again else None
    with caplog.at_level(logging.INFO):
        await canary.check(engine, before)
    _, _, logged = caplog.messages[-1].partition(": ")
    names = [check.partition(" (")[0] for check in logged.split(", ")]
    assert names == ["form", "each text alone", "differences", *checks]


async def test_reference_texts_are_embedded_without_an_instruction():
    engine = KalmEngine()
    vectors = await canary.check(engine)
    texts, how = engine.asked[-1]
    assert texts == list(reference.TEXTS)
    assert how == {"role": "query", "truncate": "error", "deadline": None}
    assert np.array_equal(vectors, engine.right(canary.TEXTS))


@pytest.mark.parametrize(
    ("spoil", "found", "identities"),
    [
        (with_row(0, KalmEngine().right(reference.TEXTS[7:8])), "'How tall is K2?'", (BF16, FP8)),
        (lambda v: v[:, ::-1], "published values: ", (BF16, FP8)),
        (
            with_row(13, KalmEngine().right(["another"])),
            "'Each sentence is converted'",
            (BF16, FP8),
        ),
        (lambda v: np.vstack([v[:-4], similar(0, 0.03)]), "0.9620 instead of 0.9320", (BF16,)),
        (lambda v: np.vstack([v[:-4], similar(0, -0.06)]), "0.8720 instead of 0.9320", (BF16, FP8)),
        (lambda v: kalm_turned(v, 0.908), "published similarities: ", (BF16, FP8)),
        (with_row(3, np.nan), "values that are not finite", (BF16, FP8)),
        (lambda v: v[:-1], "vectors of shape (17, 3840) instead of (18, 3840)", (BF16, FP8)),
    ],
    ids=[
        "order",
        "values reversed",
        "one text's values",
        "a similarity off by .03",
        "a similarity off by .06",
        "mean pooling",
        "not finite",
        "one too few",
    ],
)
async def test_vectors_that_differ_from_kalms_are_detected(spoil, found, identities):
    for identity in identities:
        for before in (None, KalmEngine().right(canary.TEXTS)):
            with pytest.raises(CanaryFailedError, match=re.escape(found)):
                await canary.check(KalmEngine(reference_batch(spoil), identity), before)


async def test_rounding_differences_of_a_quantization_pass():
    near = reference_batch(lambda v: kalm_turned(v, 0.99986))
    coarse = reference_batch(lambda v: kalm_turned(v, 0.997))
    await canary.check(KalmEngine(near))
    await canary.check(KalmEngine(near, FP8))
    await canary.check(KalmEngine(coarse, FP8))
    off = reference_batch(lambda v: np.vstack([v[:-4], similar(0, 0.03)]))
    await canary.check(KalmEngine(off, FP8))


async def test_truncated_kalm_vectors_are_detected():
    engine = KalmEngine(lambda v: v[:, :64] / np.linalg.norm(v[:, :64], axis=1, keepdims=True))
    engine.dimensions = (64,)
    with pytest.raises(CanaryFailedError, match=re.escape("shape (18, 64) instead of (18, 3840)")):
        await canary.check(engine)
