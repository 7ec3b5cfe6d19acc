"""Texts far over a model's length: enough of them is tokenized, and not all.

A text of 262,144 characters can take a tokenizer 20 seconds. Slices of it are tokenized until they
have more tokens than the model reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_SLICE: Final = 4096
_SEAM: Final = 16
"""Tokens by which a slice may have more than the same characters have within their text."""


def beginning(text: str, count: Callable[[str], int], most: int) -> tuple[str, int | None]:
    """As much of a text as it takes to tell whether it has more than `most` tokens.

    Args:
        text: The text.
        count: Counts the tokens of a slice of it.
        most: Tokens.

    Returns:
        The text and None; or a beginning of it that has more than `most` tokens, the first `most`
        of which are those of the text, and about how many tokens the text has.
    """
    tokens = 0
    for start in range(0, len(text), _SLICE):
        end = start + 2 * _SLICE  # where a text is cut, tokens change: not before the next slice
        if end >= len(text):
            break
        tokens += max(0, count(text[start : start + _SLICE]) - _SEAM)
        if tokens > most:
            return text[:end], tokens * len(text) // (start + _SLICE)
    return text, None


def reason(tokens: int, most: int, *, exact: bool) -> str:
    """Why a text cannot be embedded."""
    return f"is too long: {'' if exact else 'about '}{tokens:,} tokens, over the limit of {most:,}"
