"""Identities: equal fingerprints mean comparable vectors, in every process and every release."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_integrations.errors import IdentityMismatchError
from kalm_integrations.identity import SpaceIdentity, VectorIdentity, fingerprint

SPACE = SpaceIdentity(
    model="model",
    revision="0123abc",
    pooling="last",
    normalized=True,
    attention="causal",
    quantization="bf16",
    profile=1,
)
VECTORS = VectorIdentity(space=SPACE, dimensions=3840, document_template="{text}")
FIELDS = [field.name for field in fields(SpaceIdentity)]
SPACES = st.builds(SpaceIdentity)


def altered(name: str) -> SpaceIdentity:
    value = getattr(SPACE, name)
    other = not value if isinstance(value, bool) else value * 2
    return replace(SPACE, **{name: other})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({}, "44136fa355b3678a"),
        ({"b": 1, "a": "é"}, "6d9eb45284090145"),
        (SPACE.to_dict(), SPACE.fingerprint),
        (VECTORS.to_dict(), VECTORS.fingerprint),
    ],
)
def test_a_fingerprint_is_the_sha256_of_canonical_json(value, expected):
    assert fingerprint(value) == expected


def test_fingerprints_are_the_same_in_every_release():
    assert (SPACE.fingerprint, VECTORS.fingerprint) == ("22552c4ba6ea2721", "057f40593052b3e7")


def test_the_order_of_keys_does_not_matter():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_the_space_is_part_of_both_fingerprints(name):
    other = altered(name)
    assert other.fingerprint != SPACE.fingerprint
    assert replace(VECTORS, space=other).fingerprint != VECTORS.fingerprint


@pytest.mark.parametrize("change", [{"dimensions": 1024}, {"document_template": "doc: {text}"}])
def test_dimensions_and_document_template_are_part_of_the_vectors_identity(change):
    assert replace(VECTORS, **change).fingerprint != VECTORS.fingerprint


@given(SPACES, SPACES)
def test_two_spaces_have_one_fingerprint_exactly_if_they_are_equal(one, other):
    assert (one.fingerprint == other.fingerprint) == (one == other)
    assert (one.differences(other) == "") == (one == other)


@given(SPACES)
def test_a_space_identity_survives_json(space):
    assert SpaceIdentity.from_dict(json.loads(json.dumps(space.to_dict()))) == space


@pytest.mark.parametrize("name", FIELDS)
def test_a_dict_that_lacks_a_field_is_refused_by_its_name(name):
    value = SPACE.to_dict()
    del value[name]
    with pytest.raises(ValueError, match=rf"missing \['{name}'\], unknown \[\]"):
        SpaceIdentity.from_dict(value)


def test_a_dict_with_an_unknown_field_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"missing \[\], unknown \['dtype'\]"):
        SpaceIdentity.from_dict(SPACE.to_dict() | {"dtype": "bf16"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, None) for name in FIELDS),
        ("model", 1),
        ("revision", b"0123abc"),
        ("normalized", 1),
        ("normalized", "true"),
        ("profile", True),
        ("profile", 1.0),
        ("profile", "1"),
    ],
)
def test_a_value_of_another_type_is_refused_not_converted(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        SpaceIdentity.from_dict(SPACE.to_dict() | {name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_differences_name_the_field_mine_first(name):
    other = altered(name)
    mine, theirs = getattr(SPACE, name), getattr(other, name)
    assert SPACE.differences(other) == f"{name}: {mine!r} != {theirs!r}"


def test_differences_list_every_field_that_differs():
    other = replace(SPACE, pooling="mean", profile=2)
    assert SPACE.differences(other) == "pooling: 'last' != 'mean'; profile: 1 != 2"


def test_a_vector_identity_survives_json():
    kept = VectorIdentity.from_dict(json.loads(json.dumps(VECTORS.to_dict())))
    assert kept == VECTORS
    VECTORS.check(kept)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(VECTORS, dimensions=256), "dimensions: 3840 != 256"),
        (
            replace(VECTORS, document_template="d: {text}"),
            "document_template: '{text}' != 'd: {text}'",
        ),
        (replace(VECTORS, space=replace(SPACE, pooling="mean")), "pooling: 'last' != 'mean'"),
    ],
)
def test_an_index_of_other_vectors_is_refused_with_what_differs(other, message):
    with pytest.raises(IdentityMismatchError) as caught:
        VECTORS.check(other)
    for part in (message, VECTORS.fingerprint, other.fingerprint):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [{}, {"space": {}}, {**VECTORS.to_dict(), "dimensions": None}, 3])
def test_an_invalid_vector_identity_is_refused(value):
    with pytest.raises(ValueError, match="not a"):
        VectorIdentity.from_dict(value)
