"""Every way in which a response can be wrong is rejected, with its reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import (
    CorruptedAnswerError,
    IdentityMismatchError,
    InvalidResponseError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import EMBEDDED
from kalm_integrations.protocol import EmbedRequest, EmbedResponse
from kalm_integrations.response_validator import ResponseValidator
from kalm_integrations.result import Usage

SPACE = EMBEDDED.space


def validator_of(**arguments):
    settings = {"backend": "local", "base_url": "http://there", "model": None}
    settings |= {"expected_identity": None, "dimensions": None}
    return ResponseValidator(ClientConfig.model_construct(**(settings | arguments)))


def check(vectors, identity=SPACE, rows=3, dimensions=4, dtype="float32"):
    response = EmbedResponse(vectors=vectors, identity=identity, usage=Usage())
    validator_of(dimensions=dimensions, vector_dtype=dtype).check(response, request(rows))


def request(texts=1):
    return EmbedRequest(texts=["text"] * texts, role="document")


def unit(rows=3, columns=4, dtype="float32"):
    return np.eye(rows, columns, dtype=dtype)


def with_row(row, values, dtype="float32"):
    vectors = unit(dtype=dtype)
    vectors[row] = values
    return vectors


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_unit_vectors_of_the_requested_shape_and_type_pass(dtype):
    check(unit(dtype=dtype), dtype=dtype)


@pytest.mark.parametrize(
    ("vectors", "got"),
    [
        (unit(rows=2), "float32 of shape (2, 4)"),
        (unit(rows=4), "float32 of shape (4, 4)"),
        (unit(rows=0), "float32 of shape (0, 4)"),
        (unit(columns=5), "float32 of shape (3, 5)"),
        (unit().ravel(), "float32 of shape (12,)"),
        (unit()[None], "float32 of shape (1, 3, 4)"),
        (unit(dtype="float16"), "float16 of shape (3, 4)"),
        (unit(dtype="float64"), "float64 of shape (3, 4)"),
        (unit(dtype="int8"), "int8 of shape (3, 4)"),
        (unit(dtype=">f4"), ">f4 of shape (3, 4)"),
    ],
)
def test_a_wrong_count_dimension_or_type_is_rejected(vectors, got):
    with pytest.raises(InvalidResponseError) as caught:
        check(vectors)
    assert got in str(caught.value)


INVALID_VECTORS = pytest.mark.parametrize(
    ("values", "what"),
    [
        ([np.nan, 1, 0, 0], "values that are not finite"),
        ([np.inf, 0, 0, 0], "values that are not finite"),
        ([-np.inf, np.nan, 0, 0], "values that are not finite"),
        ([0, 0, 0, 0], "a vector of length 0.0000 instead of 1"),
        ([300, 400, 0, 0], "a vector of length 500.0000 instead of 1"),
        ([0.5, 0, 0, 0], "a vector of length 0.5000 instead of 1"),
        ([0.9975, 0, 0, 0], "a vector of length 0.997"),
        ([1.0025, 0, 0, 0], "a vector of length 1.00"),
    ],
)


@pytest.mark.parametrize("row", [0, 1, 2])
@INVALID_VECTORS
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_invalid_vector_is_rejected_by_row(row, values, what, dtype):
    with pytest.raises(InvalidResponseError) as caught:
        check(with_row(row, values, dtype), dtype=dtype)
    assert str(caught.value).startswith(f"texts[{row}] got {what}")
    assert [bad.index for bad in caught.value.invalid] == [row]


@INVALID_VECTORS
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_single_vector_is_checked_as_strictly(values, what, dtype):
    check(unit(rows=1, dtype=dtype), rows=1, dtype=dtype)
    with pytest.raises(InvalidResponseError) as caught:
        check(np.array([values], dtype=dtype), rows=1, dtype=dtype)
    assert str(caught.value).startswith(f"texts[0] got {what}")


def test_values_whose_square_overflows_are_rejected_without_a_warning():
    with pytest.raises(InvalidResponseError, match=r"texts\[1\] got a vector of length inf"):
        check(with_row(1, [3e38, 0, 0, 0]))
    with pytest.raises(InvalidResponseError, match=r"texts\[0\] got a vector of length inf"):
        check(np.float32([[3e38, 0, 0, 0]]), rows=1)


def test_all_invalid_vectors_are_named():
    with pytest.raises(InvalidResponseError) as caught:
        check(unit() * np.float32([[2], [1], [3]]))
    assert [bad.index for bad in caught.value.invalid] == [0, 2]


@pytest.mark.parametrize("length", [0.9985, 1.0015])
def test_a_length_within_the_tolerance_passes(length):
    check(unit() * np.float32(length))


@pytest.mark.parametrize("length", [0.9975, 1.0025])
def test_a_length_outside_the_tolerance_is_rejected(length):
    with pytest.raises(InvalidResponseError, match="instead of 1"):
        check(unit() * np.float32(length))


@given(seed=st.integers(0, 2**32), columns=st.integers(1, 4096), tail=st.sampled_from([1, 3, 9]))
def test_every_unit_vector_passes_after_rounding_to_float16(seed, columns, tail):
    wide = np.random.default_rng(seed).normal(size=(1, columns)) ** tail
    vectors = (wide / np.linalg.norm(wide)).astype(np.float16)
    check(vectors, rows=1, dimensions=columns, dtype="float16")


@pytest.mark.parametrize("field", ["model", "revision", "pooling", "attention", "quantization"])
def test_vectors_of_another_space_are_rejected_whichever_field_differs(field):
    other = replace(SPACE, **{field: "another"})
    with pytest.raises(IdentityMismatchError, match=f"{field}: .* != 'another'") as caught:
        check(unit(), identity=other)
    assert SPACE.fingerprint in str(caught.value)
    assert other.fingerprint in str(caught.value)


def test_a_service_without_identity_is_accepted_with_one_warning(caplog):
    validator = validator_of()
    for _ in range(3):
        validator.check_identity(None)
    assert caplog.text.count("unverified") == 1


def test_a_service_without_identity_does_not_match_an_expected_identity():
    with pytest.raises(IdentityMismatchError, match="the service reports no identity"):
        validator_of(expected_identity=SPACE).check_identity(None)


def test_a_later_identity_is_adopted_if_the_first_probe_had_none():
    """The response of one probe may be a proxy's."""
    validator = validator_of()
    validator.check_identity(None)
    validator.check_identity(SPACE)
    validator.check_identity(SPACE)
    with pytest.raises(IdentityMismatchError):
        validator.check_identity(replace(SPACE, revision="another"))
    with pytest.raises(IdentityMismatchError):
        validator.check_identity(None)


def test_vectors_with_an_identity_are_rejected_after_vectors_without_one():
    validator = validator_of(dimensions=4, vector_dtype="float32")
    validator.check(EmbedResponse(vectors=unit(), identity=None, usage=Usage()), request(3))
    with pytest.raises(IdentityMismatchError):
        validator.check(EmbedResponse(vectors=unit(), identity=SPACE, usage=Usage()), request(3))


def test_a_response_to_another_request_is_rejected():
    sent = EmbedRequest(texts=["a", "b"], role="document")
    response = EmbedResponse(vectors=unit(2), identity=SPACE, usage=Usage(), digest=sent.digest())
    validator = validator_of(dimensions=4, vector_dtype="float32")
    validator.check(response, sent)
    validator.check(replace(response, digest=None), sent)  # a server that reports none
    with pytest.raises(CorruptedAnswerError):
        validator.check(response, replace(sent, texts=["b", "a"]))


@pytest.mark.parametrize("later", [None, replace(SPACE, revision="another")])
def test_a_changed_identity_is_rejected(later):
    validator = validator_of()
    validator.check_identity(SPACE)
    validator.check_identity(replace(SPACE))
    with pytest.raises(IdentityMismatchError, match="the service changed from universal"):
        validator.check_identity(later)


def test_the_first_response_of_an_unknown_model_sets_dimensions_and_identity():
    validator = validator_of(backend="http", model="some/model", vector_dtype="float32")
    space = SpaceIdentity.undeclared("some/model")
    for served in (replace(space, revision="abc"), replace(space, revision="abc")):
        validator.check(EmbedResponse(vectors=unit(), identity=served, usage=Usage()), request(3))
    with pytest.raises(InvalidResponseError, match=r"of 4 dimensions, got .* \(3, 5\)"):
        validator.check(
            EmbedResponse(vectors=unit(columns=5), identity=served, usage=Usage()), request(3)
        )
    with pytest.raises(IdentityMismatchError, match=r"expected some/model .*, but the service has"):
        validator_of(backend="http", model="some/model").check_identity(SPACE)


def test_a_wrong_space_is_reported_before_wrong_dimensions():
    with pytest.raises(IdentityMismatchError):
        check(unit(columns=9), identity=replace(SPACE, profile=2))
