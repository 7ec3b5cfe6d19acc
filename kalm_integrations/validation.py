"""The rules for texts and vectors, shared by client and service.

| text | decision |
|---|---|
| a string with visible content, control characters and `<bos>` included | embedded as it is |
| empty, or white space only | refused: all of them would share one meaningless vector |
| not a string (None, bytes, numbers, token ids) | refused |
| a lone surrogate | refused: not Unicode text, no tokenizer accepts it |
| over 262,144 characters, with truncate="error" | refused: longer than any model's length |

Vectors have finite values and length 1, within `NORM_TOLERANCE` (`invalid_rows`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.errors import (
    InputTooLongError,
    InvalidArgumentError,
    InvalidInputError,
    InvalidText,
)
from kalm_integrations.floats import widen

if TYPE_CHECKING:
    from kalm_integrations.protocol import Truncate

MAX_CHARACTERS: Final = 262_144
"""Counting characters is free, tokenizing a huge text is not. Text has 1 to 5 characters per token;
this is 8 for each of the 32,768 tokens that the largest deployment reads."""
NORM_TOLERANCE: Final = 2e-3
"""Largest difference of a vector's length from 1: float16 rounds by up to 5e-4; an unnormalized
vector is off by far more."""

_TOO_LONG: Final = "is too long: "
_MIN_SQUARE, _MAX_SQUARE = (1 - NORM_TOLERANCE) ** 2, (1 + NORM_TOLERANCE) ** 2


# --- texts


def check_texts(texts: object, truncate: Truncate) -> list[str]:
    """Return all of `texts` as plain strings.

    Raises:
        InvalidArgumentError: `texts` is not an ordered collection.
        InvalidInputError: Some texts cannot be embedded; `invalid` names every one of them.
    """
    collection = texts if isinstance(texts, list) else check_collection(texts)
    valid, invalid = partition_valid(enumerate(collection), truncate)
    if invalid:
        raise invalid_input(invalid)
    return [text for _, text in valid]


def check_collection(texts: object) -> Iterable[object]:
    """Return `texts` if it is an ordered collection or iterator.

    Raises:
        InvalidArgumentError: It is a single string, has no order, or is not a collection.
    """
    if isinstance(texts, str | bytes | bytearray):
        raise InvalidArgumentError(f"texts is one {type(texts).__name__}, not a list of texts.")
    if isinstance(texts, set | frozenset | Mapping):
        raise InvalidArgumentError(
            f"texts is a {type(texts).__name__}, whose order is not that of the vectors."
        )
    # Iterating over a table gives its column names, over a matrix its rows.
    if not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) != 1:
        raise InvalidArgumentError(f"texts is {_describe(texts)}, not a list of texts.")
    return texts


def partition_valid(
    texts: Iterable[tuple[int, object]], truncate: Truncate
) -> tuple[list[tuple[int, str]], list[InvalidText]]:
    """Split (index, text) pairs into texts that can be embedded, and the others with a reason."""
    valid: list[tuple[int, str]] = []
    invalid: list[InvalidText] = []
    for index, text in texts:
        reason = why_invalid(text, truncate)
        if reason is not None:
            invalid.append(InvalidText(index, reason))
        elif type(text) is str:
            valid.append((index, text))
        else:  # a subclass may redefine its length, comparison or pickling
            assert isinstance(text, str)
            valid.append((index, str.__str__(text)))
    return valid, invalid


def why_invalid(text: object, truncate: Truncate) -> str | None:
    """Why `text` cannot be embedded, or None."""
    if not isinstance(text, str):
        return _why_not_text(text)
    if type(text) is not str:
        text = str.__str__(text)
    if not text or text.isspace():
        return "is white space only" if text else "is empty"
    if len(text) > MAX_CHARACTERS and truncate == "error":
        return f"{_TOO_LONG}{len(text):,} characters, over the limit of {MAX_CHARACTERS:,}"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"has a lone surrogate at character {error.start}: it was decoded wrongly"
    return None


def invalid_input(invalid: list[InvalidText]) -> InvalidInputError:
    """The error that names `invalid`."""
    too_long = all(each.reason.startswith(_TOO_LONG) for each in invalid)
    return (InputTooLongError if too_long else InvalidInputError).of(invalid)


def _why_not_text(text: object) -> str:
    match text:
        case None:
            return "is None, not a string"
        case bytes() | bytearray():
            return f"is {type(text).__name__}, not a string: decode it first"
        case list() | tuple():
            return f"is a {type(text).__name__}, not a string (token ids are not accepted)"
        case _:
            return f"is {_describe(text)}, not a string"


def _describe(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


# --- vectors


def invalid_rows(vectors: NDArray[Any]) -> list[InvalidText]:
    """The rows that are not finite vectors of unit length, each with the reason.

    Args:
        vectors: One per row, of any floating-point type.
    """
    if not len(vectors):
        return []
    if len(vectors) == 1:  # a query: each numpy call costs more than its arithmetic
        row = vectors[0].astype(np.float32)
        if _MIN_SQUARE <= np.vdot(row, row) <= _MAX_SQUARE:
            return []
    wide = widen(vectors)
    with np.errstate(all="ignore"):  # a row that overflows is invalid
        # Each row times itself: three times as fast as einsum.
        squares = np.matmul(wide[:, None, :], wide[:, :, None])
        if squares.min() >= _MIN_SQUARE and squares.max() <= _MAX_SQUARE:  # False for NaN
            return []
        lengths = np.sqrt(squares[:, 0, 0])
    invalid = np.flatnonzero(~(np.abs(lengths - 1.0) <= NORM_TOLERANCE)).tolist()
    return [
        InvalidText(
            row,
            f"got a vector of length {lengths[row]:.4f} instead of 1"
            if np.isfinite(vectors[row]).all()
            else "got values that are not finite",
        )
        for row in invalid
    ]
