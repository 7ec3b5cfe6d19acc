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


def answer(rows=2, columns=3, dtype="float16", tokens=7, identity=EMBEDDED.space):
    vectors = np.random.default_rng(rows).normal(size=(rows, columns)).astype(dtype)
    return EmbedAnswer(vectors=vectors, identity=identity, usage=Usage(tokens, 1))


@given(
    rows=st.integers(0, 20),
    columns=st.integers(1, 50),
    dtype=st.sampled_from(["float16", "float32"]),
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


def test_it_is_plain_safetensors_that_any_reader_reads():
    packed = answer()
    assert np.array_equal(load(pack(packed))["vectors"], packed.vectors)


@given(cut=st.integers(0, 10_000))
def test_a_body_that_is_cut_off_anywhere_is_refused(cut):
    whole = pack(answer(rows=20, columns=200))
    with pytest.raises(InvalidResponseError, match="not packed vectors"):
        unpack(whole[: min(cut, len(whole) - 1)])


def _with_metadata(**metadata):
    return save({"vectors": answer().vectors}, metadata=metadata)


IDENTITY = json.dumps(EMBEDDED.space.to_dict())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff" * 300,
        b"<html>",
        pickle.dumps({"vectors": [1.0]}),
        pack(answer()) + b"more",
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
