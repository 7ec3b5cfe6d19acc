"""The conversions of vectors: every bit pattern has the value that numpy gives it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from kalm_integrations.floats import to_lists, widen

EVERY_FLOAT16 = np.arange(2**16, dtype=np.uint16).view(np.float16)
FINITE = EVERY_FLOAT16[np.isfinite(EVERY_FLOAT16)]


def test_every_finite_float16_becomes_the_same_float32():
    # Compared as bytes: 0.0 == -0.0, and the sign is part of the value.
    assert widen(FINITE).tobytes() == FINITE.astype(np.float32).tobytes()


def test_numbers_that_are_not_finite_are_far_from_a_unit_vector():
    assert (np.abs(widen(EVERY_FLOAT16[~np.isfinite(EVERY_FLOAT16)])) >= 2**16).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", ">f2", ">f4"])
def test_other_types_become_float32_too(dtype):
    vectors = np.array([[0.5, -0.0], [3e4, 1.0]], dtype=dtype)
    assert widen(vectors).dtype == np.float32
    assert widen(vectors).tolist() == vectors.tolist()


def test_a_view_with_gaps_is_widened_like_its_copy():
    vectors = FINITE[:4000].reshape(40, 100)[::3, ::-7]
    assert widen(vectors).tolist() == vectors.tolist()


def test_unaligned_vectors_are_widened_like_their_copy():
    body = b"x" + FINITE.tobytes()
    assert np.array_equal(widen(np.frombuffer(body, np.float16, offset=1)), widen(FINITE))


@pytest.mark.parametrize("columns", [1, 64, FINITE.size])
def test_lists_of_float16_have_the_exact_value_of_every_bit_pattern(columns):
    vectors = FINITE.reshape(-1, columns)
    lists = to_lists(vectors)
    # Compared as bytes: 0.0 == -0.0, and the sign is part of the value.
    assert np.array(lists).tobytes() == vectors.astype(np.float64).tobytes()
    assert {type(number) for row in lists for number in row} == {float}


@pytest.mark.parametrize("dtype", ["float32", "float64", ">f2"])
def test_lists_of_other_types_have_the_exact_values_too(dtype):
    vectors = np.array([[0.1, -0.0, 1e-7], [3e4, 2 / 3, 1.0]], dtype=dtype)
    assert to_lists(vectors) == vectors.astype(np.float64).tolist()


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 15, 16, 17, 700])
def test_no_row_is_lost_between_steps_of_the_conversion(rows):
    vectors = np.arange(rows * 2, dtype=np.float16).reshape(rows, 2)
    assert to_lists(vectors) == vectors.tolist()


def test_a_view_with_gaps_converts_like_its_copy():
    vectors = FINITE[:4000].reshape(40, 100)[::3, ::-7]
    assert to_lists(vectors) == vectors.tolist()


def test_lists_of_float16_share_their_floats_and_take_about_8_bytes_a_number():
    vectors = np.random.default_rng(0).normal(size=(500, 512)).astype(np.float16)
    to_lists(vectors)  # the shared floats themselves are made once a process
    tracemalloc.start()
    lists = to_lists(vectors)
    allocated, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert allocated < 8.5 * vectors.size
    assert len({id(number) for row in lists for number in row}) == len(np.unique(vectors))


def test_rows_are_separate_lists():
    vectors = np.ones((2, 2), dtype=np.float16)
    to_lists(vectors)[0][0] = 7.0
    assert to_lists(vectors) == [[1.0, 1.0], [1.0, 1.0]]
