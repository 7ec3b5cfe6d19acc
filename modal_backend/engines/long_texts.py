"""Finds texts that are too long without tokenizing all of them: 262,144 characters can take a
tokenizer 20 seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kalm_integrations.errors import InvalidText

_SLICE: Final = 4096
_SEAM: Final = 16
"""Tokens by which a slice may exceed the same characters within their text."""


def long_enough_prefix(
    text: str, count: Callable[[str], int], max_tokens: int
) -> tuple[str, int | None]:
    """Return a prefix of a text that shows whether it has more than `max_tokens` tokens.

    Args:
        text: The text.
        count: Counts the tokens of a slice of it.
        max_tokens: The limit.

    Returns:
        The whole text and None; or a prefix with more than `max_tokens` tokens, of which the first
        `max_tokens` are those of the text, and an estimate of the tokens of the text.
    """
    tokens = 0
    for start in range(0, len(text), _SLICE):
        end = start + 2 * _SLICE  # a cut changes tokens near it: keep it away from this slice
        if end >= len(text):
            break
        tokens += max(0, count(text[start : start + _SLICE]) - _SEAM)
        if tokens > max_tokens:
            return text[:end], tokens * len(text) // (start + _SLICE)
    return text, None


def too_long(index: int, tokens: int, max_tokens: int, *, exact: bool) -> InvalidText:
    """Describe a text over the limit."""
    about = "" if exact else "about "
    return InvalidText(
        index, f"is too long: {about}{tokens:,} tokens, over the limit of {max_tokens:,}"
    )
