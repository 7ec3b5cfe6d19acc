"""Which texts can be embedded. Client and service ask the same question here.

| text | decision |
|---|---|
| a string with something in it, control characters and `<bos>` included | embedded as it is |
| empty, or white space only | refused: all of them would share one meaningless vector |
| not a string (None, bytes, numbers, token ids) | refused |
| a lone surrogate | refused: not Unicode text, no tokenizer takes it |
| over 262,144 characters, with truncate="error" | refused: longer than any model's length |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from kalm_integrations.codec import Truncate
from kalm_integrations.errors import (
    InputTooLongError,
    InvalidArgumentError,
    InvalidInputError,
    InvalidText,
)

MAX_CHARACTERS: Final = 262_144
"""Counting characters is free, tokenizing a huge text is not. Text has 1 to 5 characters a token;
this is 8 for each of the 32,768 tokens that the largest deployment takes."""


_TOO_LONG: Final = "is too long: "


def iterate(texts: object) -> Iterable[object]:
    """`texts` itself, if it is an ordered collection or iterator of texts.

    Raises:
        InvalidArgumentError: It is a single string, has no order, or is no collection.
    """
    if isinstance(texts, str | bytes | bytearray):
        raise InvalidArgumentError(f"texts is one {type(texts).__name__}, not a list of texts.")
    if isinstance(texts, set | frozenset | Mapping):
        raise InvalidArgumentError(
            f"texts is a {type(texts).__name__}, whose order is not that of the vectors."
        )
    # A table iterates over its columns' names, a matrix over its rows.
    if not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) != 1:
        raise InvalidArgumentError(f"texts is {_describe(texts)}, not a list of texts.")
    return texts


def why_invalid(text: object, truncate: Truncate) -> str | None:
    """Why `text` cannot be embedded, or None."""
    if not isinstance(text, str):
        return _why_not_text(text)
    if not text or text.isspace():
        return "is empty" if not text else "is white space only"
    if len(text) > MAX_CHARACTERS and truncate == "error":
        return f"{_TOO_LONG}{len(text):,} characters, over the limit of {MAX_CHARACTERS:,}"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"has a lone surrogate at character {error.start}: it was decoded wrongly"
    return None


def sort_out(
    texts: Iterable[tuple[int, object]], truncate: Truncate
) -> tuple[list[tuple[int, str]], list[InvalidText]]:
    """(index, text) pairs that can be embedded, and the others with the reason."""
    valid: list[tuple[int, str]] = []
    invalid: list[InvalidText] = []
    for index, text in texts:
        if type(text) is not str and isinstance(text, str):
            # A subclass may measure, compare or pickle itself in its own way.
            text = str.__str__(text)  # noqa: PLW2901
        reason = why_invalid(text, truncate)
        if reason is None:
            assert isinstance(text, str)
            valid.append((index, text))
        else:
            invalid.append(InvalidText(index, reason))
    return valid, invalid


def check(texts: Iterable[object], truncate: Truncate) -> list[str]:
    """All of `texts`, as plain strings.

    Raises:
        InvalidInputError: Some cannot be embedded; `invalid` names every one of them.
    """
    valid, invalid = sort_out(enumerate(texts), truncate)
    if invalid:
        raise refusal(invalid)
    return [text for _, text in valid]


def refusal(invalid: list[InvalidText]) -> InvalidInputError:
    """The error that names `invalid`."""
    too_long = all(bad.reason.startswith(_TOO_LONG) for bad in invalid)
    return (InputTooLongError if too_long else InvalidInputError).of(invalid)


def _why_not_text(text: object) -> str:
    match text:
        case None:
            return "is None, not a string"
        case bytes() | bytearray():
            return f"is {type(text).__name__}, not a string: decode it first"
        case list() | tuple():
            return f"is a {type(text).__name__}, not a string (token ids are not taken)"
        case _:
            return f"is {_describe(text)}, not a string"


def _describe(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
