"""Rows into their places: whatever order parts come in, and when some never come."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_integrations.errors import InvalidResponseError
from kalm_integrations.identity import VectorIdentity
from kalm_integrations.models import EMBEDDED
from kalm_integrations.protocol import VectorDtype
from kalm_integrations.result import ArrayBuilder, EmbeddedBatch, ListBuilder, Usage

IDENTITY = VectorIdentity(space=EMBEDDED.space, dimensions=4, document_template="{text}")


def part(*indices: int, dtype: str = "float16") -> EmbeddedBatch:
    """Rows that say which text they are of."""
    rows = np.repeat(np.array(indices, dtype=dtype)[:, None], 4, axis=1)
    return EmbeddedBatch(np.array(indices, dtype=np.int64), rows, Usage(len(indices), 1))


def filled(total: int, *parts: EmbeddedBatch, dtype: VectorDtype = "float16") -> ArrayBuilder:
    builder = ArrayBuilder(total, 4, dtype, IDENTITY)
    for each in parts:
        builder.add(each)
    return builder


@given(
    st.integers(0, 40).flatmap(lambda n: st.permutations(range(n))), st.lists(st.integers(0, 40))
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_batches_in_any_order_give_each_text_its_vector(dtype, order, cuts):
    rows = np.split(np.array(order, dtype=np.int64), sorted(cuts))
    parts = [part(*row, dtype=dtype) for row in rows]
    result = filled(len(order), *parts, dtype=dtype).result()
    assert result.packed.dtype == dtype
    assert result.packed.tolist() == [[index] * 4 for index in range(len(order))]
    assert result.identity is IDENTITY
    assert result.usage == Usage(len(order), len(parts))


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_a_text_without_a_vector_is_an_error(case):
    total, indices = case
    missing = sorted(set(range(total)) - indices)
    builder = filled(total, part(*indices))
    if missing:
        with pytest.raises(InvalidResponseError, match=rf"texts\[{missing[0]}\] got no vector"):
            builder.result()
    else:
        assert len(builder.result()) == total


def test_an_empty_call_has_a_result_of_the_right_width():
    assert filled(0).result().packed.shape == (0, 4)


def test_a_batch_of_another_call_is_an_error():
    with pytest.raises(IndexError):
        filled(2, part(2))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_partial_has_the_finished_vectors(dtype):
    builder = filled(6, part(4, 1, dtype=dtype), part(3, dtype=dtype))
    partial = builder.partial()
    assert partial.indices.tolist() == [1, 3, 4]
    assert partial.vectors.tolist() == [[1] * 4, [3] * 4, [4] * 4]
    assert partial.vectors.dtype == np.float32
    assert partial.missing.tolist() == [0, 2, 5]


def test_partial_is_empty_if_nothing_was_finished():
    assert filled(2).partial().vectors.shape == (0, 4)
    assert filled(2).partial().missing.tolist() == [0, 1]


def test_partial_does_not_change_afterwards():
    builder = filled(2, part(0, dtype="float32"))
    partial = builder.partial()
    builder._vectors[:] = 9
    assert partial.vectors.tolist() == [[0] * 4]


# --- into lists


def listed(total: int, *parts: EmbeddedBatch) -> ListBuilder:
    builder = ListBuilder(total, 4)
    for each in parts:
        builder.add(each)
    return builder


@given(
    st.integers(0, 40).flatmap(lambda n: st.permutations(range(n))), st.lists(st.integers(0, 40))
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_batches_in_any_order_give_each_text_its_list(dtype, order, cuts):
    rows = np.split(np.array(order, dtype=np.int64), sorted(cuts))
    result = listed(len(order), *(part(*row, dtype=dtype) for row in rows)).result()
    assert result == [[index] * 4 for index in range(len(order))]
    assert {type(number) for row in result for number in row} <= {float}


def test_copies_of_a_text_have_separate_lists():
    twice = EmbeddedBatch(np.array([0, 1]), np.ones((2, 4), dtype=np.float16), Usage())
    result = listed(2, twice).result()
    result[0][0] = 7
    assert result[1] == [1] * 4


def test_a_text_without_a_list_is_an_error():
    builder = listed(3, part(0, 2))
    with pytest.raises(InvalidResponseError, match=r"texts\[1\] got no"):
        builder.result()
    assert builder.partial().vectors.tolist() == [[0] * 4, [2] * 4]
    assert builder.partial().vectors.dtype == np.float32
    assert builder.partial().missing.tolist() == [1]


def test_partial_of_lists_is_empty_if_nothing_was_finished():
    assert listed(2).partial().vectors.shape == (0, 4)


@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (1, 1), (3, 4), (2, 8), (4,)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_of_another_shape_are_an_error(shape, dtype):
    wrong = EmbeddedBatch(np.array([0, 1]), np.ones(shape, dtype=dtype), Usage())
    builder = filled(2)
    with pytest.raises(InvalidResponseError):
        builder.add(wrong)
    shard = np.full((2, 4), np.nan, dtype=dtype)
    with pytest.raises(InvalidResponseError):
        wrong.write_into(shard)
    assert np.isnan(shard).all()


def test_rows_are_written_to_their_indices_in_a_shard():
    shard = np.full((3, 4), np.nan, dtype="float16")
    part(12, 10).write_into(shard, 10)
    assert shard[[0, 2]].tolist() == [[10] * 4, [12] * 4]
    assert np.isnan(shard[1]).all()
