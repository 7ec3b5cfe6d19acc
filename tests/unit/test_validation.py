"""Which texts can be embedded: the table in `inputs`, row by row."""

from __future__ import annotations

import re
from collections import Counter, deque
from enum import Enum, StrEnum
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_integrations import validation
from kalm_integrations.errors import (
    InputTooLongError,
    InvalidArgumentError,
    InvalidInputError,
    InvalidText,
)


class Label(str, Enum):  # noqa: UP042 (the older idiom is the point)
    VALUE = "text"


class ModernLabel(StrEnum):
    VALUE = "text"


class Hostile(str):
    """Equal to nothing, hashes like everything, prints as something else."""

    def __eq__(self, other):
        return False

    def __hash__(self):
        return 0

    def __str__(self):
        return "something else"


class Column:
    """Like a column of a data frame: neither a list nor a sequence, but ordered."""

    def __init__(self, *texts):
        self._texts = texts

    def __iter__(self):
        return iter(self._texts)


@pytest.mark.parametrize(
    "text",
    [
        "a",
        " a\n",
        "\x00",
        "\x07",
        "\u200b",
        "<bos>",
        "<|im_end|>",
        "{text}",
        "🙂",
        "e\u0301",
        "\ufeff",
    ],
)
@pytest.mark.parametrize("truncate", ["error", "end"])
def test_a_string_with_visible_or_control_characters_is_accepted_unchanged(text, truncate):
    assert validation.check_texts([text], truncate) == [text]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        (" ", "is white space only"),
        ("\r\n\t", "is white space only"),
        ("\u3000\xa0", "is white space only"),
        (None, "is None, not a string"),
        (b"text", "is bytes, not a string: decode it first"),
        (bytearray(b"text"), "is bytearray, not a string: decode it first"),
        ([1, 2], "is a list, not a string (token ids are not accepted)"),
        (("text",), "is a tuple, not a string (token ids are not accepted)"),
        (7, "is of type int, not a string"),
        (float("nan"), "is of type float, not a string"),
        ({"text": "a"}, "is of type dict, not a string"),
    ],
)
@pytest.mark.parametrize("truncate", ["error", "end"])
def test_an_invalid_text_is_named_by_index_and_reason(text, reason, truncate):
    with pytest.raises(InvalidInputError, match=re.escape(f"texts[1] {reason}")) as caught:
        validation.check_texts(["fine", text, "fine"], truncate)
    assert caught.value.invalid == (InvalidText(1, reason),)


@pytest.mark.parametrize(
    ("text", "character"), [("\ud800", 0), ("né\udc80e", 2), ("\U0001f642\udfff", 1)]
)
@pytest.mark.parametrize("truncate", ["error", "end"])
def test_a_lone_surrogate_is_named_by_position(text, character, truncate):
    reason = validation.why_invalid(text, truncate)
    assert f"lone surrogate at character {character}:" in reason


@pytest.mark.parametrize("character", ["x", "语"])
def test_a_text_over_262144_characters_is_too_long_unless_it_may_be_truncated(character):
    longest, longer = character * 262_144, character * 262_145
    assert validation.check_texts([longest], "error") == [longest]
    assert validation.check_texts([longer], "end") == [longer]
    with pytest.raises(
        InputTooLongError, match=r"texts\[0\] is too long: 262,145 characters, over"
    ):
        validation.check_texts([longer], "error")


def test_the_error_is_input_too_long_only_if_every_invalid_text_is_too_long():
    longer = "x" * 262_145
    with pytest.raises(InputTooLongError):
        validation.check_texts([longer, "fine", longer], "error")
    with pytest.raises(InvalidInputError) as caught:
        validation.check_texts([longer, ""], "error")
    assert type(caught.value) is InvalidInputError
    assert [bad.index for bad in caught.value.invalid] == [0, 1]


@pytest.mark.parametrize(
    "text",
    [Label.VALUE, ModernLabel.VALUE, Hostile("text"), np.str_("text")],
    ids=lambda x: type(x).__name__,
)
def test_subclasses_of_str_become_plain_strings(text):
    (checked,) = validation.check_texts([text], "error")
    assert type(checked) is str
    assert checked == "text"


def test_plain_strings_are_not_copied():
    text = "a text " * 3
    assert validation.check_texts([text], "error")[0] is text


@pytest.mark.parametrize(
    "texts",
    [
        ["a", "b"],
        ("a", "b"),
        deque(["a", "b"]),
        (letter for letter in "ab"),
        iter(["a", "b"]),
        {1: "a", 2: "b"}.values(),
        np.array(["a", "b"]),
        Column("a", "b"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_ordered_collections_and_iterators_are_accepted(texts):
    assert validation.check_collection(texts) is texts
    assert validation.check_texts(texts, "error") == ["a", "b"]


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        ("text", "texts is one str, not a list of texts."),
        (b"text", "texts is one bytes, not"),
        (bytearray(b"text"), "texts is one bytearray, not"),
        (Label.VALUE, "texts is one Label, not"),
        ({"a", "b"}, "texts is a set, whose order is not that of the vectors."),
        (frozenset("ab"), "texts is a frozenset, whose order"),
        ({"a": 1}, "texts is a dict, whose order"),
        (Counter("ab"), "texts is a Counter, whose order"),
        (MappingProxyType({"a": 1}), "texts is a mappingproxy, whose order"),
        (None, "texts is None, not a list of texts."),
        (7, "texts is of type int, not a list of texts."),
        (len, "texts is of type builtin_function_or_method, not"),
    ],
)
def test_an_argument_that_is_not_a_list_of_texts_is_rejected_as_a_whole(texts, complaint):
    with pytest.raises(InvalidArgumentError) as caught:
        validation.check_collection(texts)
    assert str(caught.value).startswith(complaint)
    assert 'Pass a list of strings, for instance ["first text", "second text"].' in str(
        caught.value
    )
    assert caught.value.invalid == ()


@given(
    st.lists(
        st.text(st.characters(), max_size=5)
        | st.sampled_from(["", " ", "\n", "a\ud800"])
        | st.none()
        | st.binary(max_size=2)
        | st.integers()
    )
)
def test_every_text_is_either_valid_or_named_with_a_reason(texts):
    def embeddable(text):
        return isinstance(text, str) and text.strip() and not re.search("[\ud800-\udfff]", text)

    valid, invalid = validation.partition_valid(enumerate(texts, 10), "error")
    assert valid == [(index, text) for index, text in enumerate(texts, 10) if embeddable(text)]
    assert [bad.index for bad in invalid] == [
        index for index, text in enumerate(texts, 10) if not embeddable(text)
    ]
    assert all(bad.reason.startswith(("is ", "has ")) for bad in invalid)


def test_overridden_methods_of_a_str_subclass_do_not_bypass_validation():
    class Liar(str):
        def isspace(self) -> bool:
            return False

        def isascii(self) -> bool:
            return True

        def __len__(self) -> int:
            return 7

    with pytest.raises(InvalidInputError, match=r"texts\[0\] is empty; texts\[1\] has a lone surr"):
        validation.check_texts([Liar(""), Liar("\ud800")], "error")


@pytest.mark.parametrize(
    "texts", [np.array("text"), np.array([["a", "b"]])], ids=["0-d array", "2-d array"]
)
def test_an_array_that_is_not_one_dimensional_is_rejected(texts):
    with pytest.raises(InvalidArgumentError, match="of type ndarray, not a list of texts"):
        validation.check_collection(texts)


def test_the_keys_of_a_dict_are_an_ordered_collection():
    assert validation.check_texts(
        validation.check_collection({"a": 1, "b": 2}.keys()), "error"
    ) == ["a", "b"]
