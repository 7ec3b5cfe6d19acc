"""Packed vectors: what comes out is what went in, and nothing else is taken for it."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from kalm_integrations.codec import pack, unpack
from kalm_integrations.errors import CorruptedAnswerError
from kalm_integrations.models import EMBEDDED
from kalm_integrations.protocol import EmbedRequest, EmbedResponse
from kalm_integrations.result import Usage

IDENTITY = json.dumps(EMBEDDED.space.to_dict())
METADATA = {"checksum": "0" * 16, "digest": "d" * 32, "usage.tokens": "7", "identity": IDENTITY}
TYPES = st.sampled_from(["float16", "float32"])


def answer(rows=2, columns=3, dtype="float16", tokens=7, identity=EMBEDDED.space):
    vectors = np.random.default_rng(rows).normal(size=(rows, columns)).astype(dtype)
    return EmbedResponse(
        vectors=vectors, identity=identity, usage=Usage(tokens, 1), digest="d" * 32
    )


def resealed(body):
    """`body` with a checksum that is right, so that only what it says is wrong."""
    start = len(b'12345678{"__metadata__": {"checksum": "')
    checksum = xxhash.xxh3_64(body[:start] + body[start + 16 :]).hexdigest().encode()
    return body[:start] + checksum + body[start + 16 :]


@given(
    rows=st.integers(0, 20),
    columns=st.integers(1, 50),
    dtype=TYPES,
    tokens=st.integers(0, 2**40),
    identified=st.booleans(),
)
def test_unpack_is_the_exact_inverse_of_pack(rows, columns, dtype, tokens, identified):
    packed = answer(rows, columns, dtype, tokens, EMBEDDED.space if identified else None)
    unpacked = unpack(pack(packed))
    assert unpacked.vectors.dtype == dtype
    assert unpacked.vectors.tobytes() == packed.vectors.tobytes()
    assert unpacked.vectors.shape == packed.vectors.shape
    assert (unpacked.identity, unpacked.usage) == (packed.identity, packed.usage)
    assert unpacked.digest == packed.digest


@given(rows=st.integers(0, 5), columns=st.integers(1, 9), dtype=TYPES)
def test_the_safetensors_library_reads_packed_vectors(rows, columns, dtype):
    packed = answer(rows, columns, dtype)
    body = pack(packed)
    assert np.array_equal(load(body)["vectors"], packed.vectors)
    assert (8 + int.from_bytes(body[:8], "little")) % 8 == 0  # as the format wants tensors


def test_strided_vectors_are_packed_like_their_copy():
    wide = answer(rows=4, columns=6)
    gaps = replace(wide, vectors=wide.vectors[::2, ::3])
    assert unpack(pack(gaps)).vectors.tolist() == wide.vectors[::2, ::3].tolist()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_flipped_bit_is_detected(dtype):
    """Each bit of the whole answer: lengths, metadata, checksum, padding and vectors."""
    whole = bytearray(pack(answer(dtype=dtype)))
    for bit in range(8 * len(whole)):
        whole[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptedAnswerError):
            unpack(whole)
        whole[bit // 8] ^= 1 << bit % 8
    unpack(whole)


@given(order=st.permutations(range(6)))
def test_rows_in_another_order_are_rejected(order):
    whole = pack(answer(rows=6, columns=8))
    head, rows = whole[:-96], np.frombuffer(whole[-96:], "<f2").reshape(6, 8)
    swapped = head + rows[order].tobytes()
    if swapped == whole:
        unpack(swapped)
        return
    with pytest.raises(CorruptedAnswerError):
        unpack(swapped)


@given(data=st.data())
def test_a_changed_head_with_a_valid_checksum_is_rejected_or_changes_no_vector(data):
    """Whatever it says: no other number of vectors, nothing outside of the body, no other error."""
    whole = bytearray(pack(answer(rows=3, columns=4)))
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    try:
        vectors = unpack(resealed(whole)).vectors
    except CorruptedAnswerError:
        return
    assert vectors.size == 12
    assert vectors.tobytes() == bytes(whole[end:])


TEXTS = st.lists(st.text(st.characters(), max_size=3), max_size=3)


@given(
    TEXTS, TEXTS, *[st.sampled_from(["query", "document"])] * 2, *[st.sampled_from([None, 64])] * 2
)
def test_digests_are_equal_exactly_if_the_vectors_are(
    texts, others, role, other_role, dimensions, other_dimensions
):
    one = EmbedRequest(texts=texts, role=role, dimensions=dimensions)
    other = EmbedRequest(texts=others, role=other_role, dimensions=other_dimensions)
    assert (one.digest() == other.digest()) == (one == other)
    hurried = replace(one, timeout=1.0, dtype="float32")
    assert hurried.digest() == one.digest()
    assert replace(one, truncate="end").digest() != one.digest()


@pytest.mark.parametrize("texts", [["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["a,b", ""]])
def test_the_boundaries_of_texts_are_part_of_the_digest(texts):
    joined = EmbedRequest(texts=["a", "b", "c"], role="query")
    assert EmbedRequest(texts=texts, role="query").digest() != joined.digest()


@given(cut=st.integers(0, 10_000))
def test_a_truncated_body_is_rejected(cut):
    whole = pack(answer(rows=20, columns=200))
    with pytest.raises(CorruptedAnswerError, match="not packed vectors"):
        unpack(whole[: min(cut, len(whole) - 1)])


def _rewritten(change):
    """An answer whose head was changed, and whose checksum is right all the same."""
    whole = pack(answer())
    end = 8 + int.from_bytes(whole[:8], "little")
    head = json.loads(whole[8:end])
    change(head)
    changed = json.dumps(head).encode()
    return resealed(len(changed).to_bytes(8, "little") + changed + whole[end:])


def _with_metadata(**changes):
    return _rewritten(lambda head: head["__metadata__"].update(changes))


def _without(name):
    return _rewritten(lambda head: head["__metadata__"].pop(name))


def _with_tensor(**changes):
    return _rewritten(lambda head: head["vectors"].update(changes))


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
        _rewritten(lambda head: head.update(more=head["vectors"])),
        _rewritten(lambda head: head.update(other=head.pop("vectors"))),
        _rewritten(lambda head: head.pop("vectors")),
        save({"vectors": answer().vectors}, metadata=METADATA),
        save({"vectors": answer().vectors}),
        _without("usage.tokens"),
        _with_metadata(**{"usage.tokens": "-7"}),
        _with_metadata(**{"usage.tokens": "many"}),
        _with_metadata(identity="{"),
        _with_metadata(identity='{"model": "m"}'),
        _with_metadata(identity=IDENTITY.replace("true", "1")),
    ],
)
def test_any_other_body_is_rejected(body):
    with pytest.raises(CorruptedAnswerError, match="not packed vectors"):
        unpack(body)


def test_another_identity_is_unpacked_unchanged():
    other = replace(EMBEDDED.space, revision="another")
    assert unpack(pack(answer(identity=other))).identity == other
