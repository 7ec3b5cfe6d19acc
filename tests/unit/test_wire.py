"""Packed vectors: what comes out is what went in, and nothing else is taken for it."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from kalm_integrations.errors import InvalidResponseError
from kalm_integrations.profiles import EMBEDDED
from kalm_integrations.result import Usage
from kalm_integrations.wire import EmbedAnswer, pack, unpack

IDENTITY = json.dumps(EMBEDDED.space.to_dict())
METADATA = {"usage.tokens": "7", "identity": IDENTITY}
TYPES = st.sampled_from(["float16", "float32"])


def answer(rows=2, columns=3, dtype="float16", tokens=7, identity=EMBEDDED.space):
    vectors = np.random.default_rng(rows).normal(size=(rows, columns)).astype(dtype)
    return EmbedAnswer(vectors=vectors, identity=identity, usage=Usage(tokens, 1))


@given(
    rows=st.integers(0, 20),
    columns=st.integers(1, 50),
    dtype=TYPES,
    tokens=st.integers(0, 2**40),
    identified=st.booleans(),
)
def test_what_is_packed_comes_out_bit_by_bit(rows, columns, dtype, tokens, identified):
    packed = answer(rows, columns, dtype, tokens, EMBEDDED.space if identified else None)
    unpacked = unpack(pack(packed))
    assert unpacked.vectors.dtype == dtype
    assert unpacked.vectors.tobytes() == packed.vectors.tobytes()
    assert unpacked.vectors.shape == packed.vectors.shape
    assert (unpacked.identity, unpacked.usage) == (packed.identity, packed.usage)


@given(rows=st.integers(0, 5), columns=st.integers(1, 9), dtype=TYPES)
def test_the_library_of_the_format_reads_what_we_pack(rows, columns, dtype):
    packed = answer(rows, columns, dtype)
    body = pack(packed)
    assert np.array_equal(load(body)["vectors"], packed.vectors)
    assert (8 + int.from_bytes(body[:8], "little")) % 8 == 0  # as the format wants tensors


@given(rows=st.integers(0, 5), columns=st.integers(1, 9), dtype=TYPES)
def test_what_the_library_writes_is_read(rows, columns, dtype):
    vectors = answer(rows, columns, dtype).vectors
    body = save({"vectors": vectors}, metadata=METADATA)
    unpacked = unpack(body)
    assert np.array_equal(unpacked.vectors, vectors)
    assert (unpacked.identity, unpacked.usage) == (EMBEDDED.space, Usage(7, 1))


def test_vectors_with_gaps_between_them_are_packed_like_their_copy():
    wide = answer(rows=4, columns=6)
    gaps = replace(wide, vectors=wide.vectors[::2, ::3])
    assert unpack(pack(gaps)).vectors.tolist() == wide.vectors[::2, ::3].tolist()


@given(data=st.data())
def test_a_damaged_head_is_refused_or_changes_nothing(data):
    """Whatever it says: no other number of vectors, nothing outside of the body, no other error."""
    whole = bytearray(pack(answer(rows=3, columns=4)))
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    try:
        vectors = unpack(whole).vectors
    except InvalidResponseError:
        return
    assert vectors.size == 12
    assert vectors.tobytes() == bytes(whole[end:])


@given(cut=st.integers(0, 10_000))
def test_a_body_that_is_cut_off_anywhere_is_refused(cut):
    whole = pack(answer(rows=20, columns=200))
    with pytest.raises(InvalidResponseError, match="not packed vectors"):
        unpack(whole[: min(cut, len(whole) - 1)])


def _with_metadata(**metadata):
    return save({"vectors": answer().vectors}, metadata=metadata)


def _with_tensor(**changes):
    whole = pack(answer())
    end = 8 + int.from_bytes(whole[:8], "little")
    head = json.loads(whole[8:end])
    head["vectors"] |= changes
    changed = json.dumps(head).encode()
    return len(changed).to_bytes(8, "little") + changed + whole[end:]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff" * 300,
        b"<html>",
        pickle.dumps({"vectors": [1.0]}),
        pack(answer()) + b"more",
        b"\x02\0\0\0\0\0\0\0[]",
        b"\xff" * 8 + b"{}",
        _with_tensor(shape=[3, 2, 1]),
        _with_tensor(shape=[6]),
        _with_tensor(shape=[-2, -3]),
        _with_tensor(shape=[2.0, 3.0]),
        _with_tensor(shape=[True, 6]),
        _with_tensor(shape=[2, 4]),
        _with_tensor(shape="23"),
        _with_tensor(dtype="BF16"),
        _with_tensor(dtype=["F16"]),
        _with_tensor(data_offsets=[2, 14]),
        _with_tensor(data_offsets=[0, 10**30]),
        save({"vectors": answer().vectors, "more": answer().vectors}, metadata=METADATA),
        _with_metadata(**METADATA | {"usage.tokens": "-7"}),
        save({"other": answer().vectors}, metadata={"usage.tokens": "7"}),
        save({"vectors": answer().vectors}),
        _with_metadata(identity=IDENTITY),
        _with_metadata(**{"usage.tokens": "many", "identity": IDENTITY}),
        _with_metadata(**{"usage.tokens": "7", "identity": "{"}),
        _with_metadata(**{"usage.tokens": "7", "identity": '{"model": "m"}'}),
        _with_metadata(**{"usage.tokens": "7", "identity": IDENTITY.replace("true", "1")}),
    ],
)
def test_anything_else_is_refused(body):
    with pytest.raises(InvalidResponseError, match="not packed vectors"):
        unpack(body)


def test_another_identity_comes_out_as_it_is_for_the_verifier_to_judge():
    other = replace(EMBEDDED.space, revision="another")
    assert unpack(pack(answer(identity=other))).identity == other
