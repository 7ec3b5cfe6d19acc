"""What a caller holds: arrays that numpy understands, lists that cost little."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_integrations.errors import InvalidText
from kalm_integrations.identity import SpaceIdentity, VectorIdentity
from kalm_integrations.result import (
    EmbeddedBatch,
    EmbeddingResult,
    PartialResult,
    Usage,
)

SPACE = SpaceIdentity(
    model="m",
    revision="r",
    pooling="last",
    normalized=True,
    attention="causal",
    quantization="bf16",
    profile=1,
)
IDENTITY = VectorIdentity(space=SPACE, dimensions=4, document_template="{text}")


def result(dtype: str) -> EmbeddingResult:
    return EmbeddingResult(np.eye(3, 4, dtype=np.float32), dtype, IDENTITY, Usage(9, 1))


def batch(*indices: int) -> EmbeddedBatch:
    return EmbeddedBatch(np.array(indices), np.eye(len(indices), 4, dtype=np.float16), Usage())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_numpy_reads_a_result_as_float32(dtype):
    res = result(dtype)
    assert np.asarray(res).dtype == res.vectors.dtype == np.float32
    assert np.array_equal(res, np.eye(3, 4))
    assert np.dot(res, [1, 2, 3, 4]).tolist() == [1, 2, 3]
    assert len(res) == 3
    assert res.to_lists() == np.eye(3, 4).tolist()


def test_asarray_of_a_result_shares_its_memory_and_array_copies():
    res = result("float16")
    assert np.shares_memory(np.asarray(res), res.vectors)
    assert not np.shares_memory(np.array(res), res.vectors)
    assert np.shares_memory(res.__array__(copy=False), res.vectors)


def test_asarray_converts_to_the_requested_type():
    assert np.asarray(result("float16"), dtype=np.float64).dtype == np.float64
    assert result("float16").__array__(np.float64).dtype == np.float64


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_packed_has_the_type_of_the_transfer(dtype):
    packed = result(dtype).packed
    assert packed.dtype == dtype
    assert np.array_equal(packed, np.eye(3, 4))


def test_vectors_of_a_batch_are_converted_at_most_once():
    def make(dtype: str) -> EmbeddedBatch:
        return EmbeddedBatch(np.arange(3), np.eye(3, dtype=dtype), Usage())

    narrow, wide = make("float16"), make("float32")
    assert narrow.vectors is narrow.vectors
    assert narrow.vectors.dtype == np.float32
    assert wide.vectors is wide.packed


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_vectors_are_writable(dtype):
    packed = np.frombuffer(np.eye(3, dtype=dtype).tobytes(), dtype=dtype).reshape(3, 3)
    part = EmbeddedBatch(np.arange(3), packed, Usage())
    part.vectors[0] = 7
    assert part.vectors[0].tolist() == [7, 7, 7]


def test_repr_contains_no_vectors():
    vectors = np.full((2, 4), 0.625, dtype=np.float32)
    answers = (
        EmbeddingResult(vectors, "float32", IDENTITY, Usage()),
        EmbeddedBatch(np.arange(2), vectors, Usage()),
        PartialResult(3, np.arange(2), vectors),
    )
    assert "0.625" in repr(vectors)
    assert all("0.625" not in repr(answer) for answer in answers)


def test_a_batch_iterates_over_index_and_vector_pairs():
    pairs = list(batch(7, 2))
    assert [(index, vector.tolist()) for index, vector in pairs] == [
        (7, [1, 0, 0, 0]),
        (2, [0, 1, 0, 0]),
    ]
    assert all(type(index) is int and vector.dtype == np.float32 for index, vector in pairs)


def test_a_batch_with_too_few_rows_is_an_error():
    part = EmbeddedBatch(np.arange(3), np.eye(2, dtype=np.float16), Usage())
    with pytest.raises(ValueError, match="shorter"):
        list(part)


def test_the_length_of_a_batch_counts_vectors_only():
    part = EmbeddedBatch(np.arange(0), np.empty((0, 4)), Usage(), (InvalidText(3, "is empty"),))
    assert len(batch(4, 5)) == 2
    assert len(part) == 0
    assert list(part) == []


@given(
    st.integers(0, 30).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)) if n else st.just(set()))
    )
)
def test_missing_has_the_indices_that_are_not_finished(case):
    total, finished = case
    indices = np.array(sorted(finished), dtype=np.int64)
    partial = PartialResult(total, indices, np.zeros((len(indices), 4), dtype=np.float32))
    assert sorted([*partial.missing.tolist(), *finished]) == list(range(total))
    assert len(partial) == len(finished)
    assert np.issubdtype(partial.missing.dtype, np.integer)


def test_usage_adds_up():
    assert sum([Usage(10, 1), Usage(5, 2)], Usage()) == Usage(tokens=15, requests=3)


@pytest.mark.slow
def test_a_fork_while_vectors_are_converted_blocks_nothing():
    """A lock that they share would stay taken for ever in a process that is forked meanwhile."""

    class Slow(np.ndarray):  # type: ignore[type-arg]
        def view(self, *arguments: Any, **named: Any) -> Any:
            begun.set()
            assert go_on.wait(10)
            return np.asarray(self).view(*arguments, **named)

    begun, go_on = threading.Event(), threading.Event()
    slow = replace(batch(0, 1, 2), packed=np.eye(3, 4, dtype=np.float16).view(Slow))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: slow.vectors)
        assert begun.wait(10)
        other = pool.submit(lambda: batch(0, 1, 2).vectors)
        try:
            np.testing.assert_array_equal(other.result(timeout=5), np.eye(3, 4))
        finally:
            go_on.set()
        np.testing.assert_array_equal(first.result(), np.eye(3, 4))
    assert slow.vectors is slow.vectors
