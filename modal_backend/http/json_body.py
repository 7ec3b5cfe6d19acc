"""Parse the JSON of a request body at a bounded cost, whatever it contains.

A parser builds one object per value, and holds Python's global lock until all are built: 5 million
empty lists take seconds and gigabytes. A valid request has few values, so a body with more is
refused before it is parsed. The rest takes at most about 0.1 s per step and four times its size.
"""

from __future__ import annotations

import json
import json.scanner
import re
from typing import Any, Final

import orjson

from kalm_integrations.errors import (
    ConfigurationError,
    InvalidArgumentError,
    RequestTooLargeError,
)
from kalm_integrations.validation import MAX_CHARACTERS
from modal_backend.service import MAX_TEXTS

_MOST_STRINGS: Final = 2 * MAX_TEXTS
"""The texts, and the names and values of many more fields than there are."""
_MOST_STRUCTURE: Final = 16 * MAX_TEXTS
"""Bytes outside strings, without white space: brackets, commas, colons, numbers, null."""
_LONGEST_ESCAPE: Final = 12
"""Bytes that one character takes at most: "\\ud83d\\ude00"."""

IDS_REFUSED: Final = (
    "input is token ids: they are another tokenizer's, and would give silently wrong vectors. "
    "Send text. (LangChain's OpenAI client has the option check_embedding_ctx_length for it.)"
)


def parse(body: bytes | bytearray) -> Any:
    """Parse a body.

    Args:
        body: JSON in UTF-8. Lone surrogates are kept, so that their text can be named later.

    Raises:
        ConfigurationError: The body is not JSON.
        InvalidArgumentError: It has too many values, and they are token ids.
        RequestTooLargeError: It has too many values.
    """
    longest = _check_structure(body)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if longest > MAX_CHARACTERS * _LONGEST_ESCAPE:  # no text is that long
            raise ConfigurationError(f"the body is not JSON: {error}.") from None
    try:  # a lone surrogate is a mistake to orjson
        return _DECODER.decode(body.decode("utf-8-sig", "surrogatepass"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(f"the body is not JSON: {error}.") from None
    except ValueError:
        raise ConfigurationError("the body has a number with too many digits.") from None


def _check_structure(body: bytes | bytearray) -> int:
    """Refuse a body with too many values, without parsing it.

    In JSON, a quotation mark that is not escaped begins or ends a string. Where the body stops
    being JSON, parsing stops too, so what this function makes of the rest does not matter.

    Returns:
        Bytes of the longest string.
    """
    if b"\\" in body:
        body = body.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    if body.count(b'"') > 2 * _MOST_STRINGS:
        raise _too_many_values()
    parts = body.split(b'"')
    structure = b"".join(parts[::2]).translate(None, b" \t\r\n")
    if len(structure) > _MOST_STRUCTURE:
        if re.match(rb"[^\[]*+\[+-?\d", structure[:200]):
            raise InvalidArgumentError(IDS_REFUSED)
        raise _too_many_values()
    return max(map(len, parts[1::2]), default=0)


def _too_many_values() -> RequestTooLargeError:
    return RequestTooLargeError(
        f"the body has many more values than {MAX_TEXTS:,} texts, which is the limit."
    )


def _python_decoder() -> json.JSONDecoder:
    """The standard library's decoder, which keeps lone surrogates, without its accelerator, which
    would not let other threads run until the whole body is parsed."""
    decoder = json.JSONDecoder()
    decoder.scan_once = json.scanner.py_make_scanner(decoder)  # type: ignore[attr-defined]
    return decoder


_DECODER: Final = _python_decoder()
