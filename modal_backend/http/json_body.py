"""Read and parse the JSON of a request body at a bounded cost, whatever it contains.

A parser builds one object per value, and holds Python's global lock until all are built: 5 million
empty lists take seconds and gigabytes. A valid request has few values, so a body with more is
refused before it is parsed. Any other body takes at most about 0.1 s per step, and memory of four
times its size.
"""

from __future__ import annotations

import json
import json.scanner
import re
from typing import Any, Final

import orjson
from starlette.requests import Request

from kalm_integrations.errors import (
    ConfigurationError,
    InvalidArgumentError,
    RequestTooLargeError,
)
from kalm_integrations.validation import MAX_CHARACTERS
from modal_backend.service import MAX_TEXTS

_MAX_STRINGS: Final = 2 * MAX_TEXTS
"""The texts, and the names and values of many more fields than there are."""
_MAX_STRUCTURE: Final = 16 * MAX_TEXTS
"""Bytes outside strings, without white space: brackets, commas, colons, numbers, null."""
_MAX_ESCAPE: Final = 12
"""Most bytes of one character: "\\ud83d\\ude00"."""

IDS_REFUSED: Final = (
    "input is token ids. Those of another tokenizer would silently return wrong vectors. "
    "Send text. (LangChain's OpenAI client has the option check_embedding_ctx_length for it.)"
)


async def read(request: Request, max_bytes: int) -> bytearray:
    """Read the body of a request.

    Raises:
        ConfigurationError: It is compressed.
        RequestTooLargeError: It has more than `max_bytes` bytes; the rest is not read.
    """
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise ConfigurationError("a compressed body is not supported; send it uncompressed.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise RequestTooLargeError(f"a body of over {max_bytes:,} bytes.")
    return body


def parse(body: bytes | bytearray) -> Any:
    """Parse a body.

    Args:
        body: JSON in UTF-8. Lone surrogates are kept, so that an error can name their text.

    Raises:
        ConfigurationError: The body is not JSON.
        InvalidArgumentError: It has too many values, which are token ids.
        RequestTooLargeError: It has too many values.
    """
    longest = _check_structure(body)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if longest > MAX_CHARACTERS * _MAX_ESCAPE:  # no text is that long
            raise ConfigurationError(f"the body is not JSON: {error}.") from None
    try:  # orjson does not accept lone surrogates
        return _DECODER.decode(body.decode("utf-8-sig", "surrogatepass"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(f"the body is not JSON: {error}.") from None
    except ValueError:
        raise ConfigurationError("the body has a number with too many digits.") from None


def _check_structure(body: bytes | bytearray) -> int:
    """Refuse a body with too many values, without parsing it.

    In JSON, a quotation mark that is not escaped begins or ends a string. Parsing stops where the
    body stops being JSON, so it does not matter how this function reads the rest.

    Returns:
        The length of the longest string in bytes.
    """
    if b"\\" in body:
        body = body.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    if body.count(b'"') > 2 * _MAX_STRINGS:
        raise _too_many_values()
    parts = body.split(b'"')
    structure = b"".join(parts[::2]).translate(None, b" \t\r\n")
    if len(structure) > _MAX_STRUCTURE:
        if re.match(rb"[^\[]*+\[+-?\d", structure[:200]):
            raise InvalidArgumentError(IDS_REFUSED)
        raise _too_many_values()
    return max(map(len, parts[1::2]), default=0)


def _too_many_values() -> RequestTooLargeError:
    return RequestTooLargeError(
        f"the body has many more values than {MAX_TEXTS:,} texts, the limit."
    )


def _python_decoder() -> json.JSONDecoder:
    """The standard library's decoder, which keeps lone surrogates, without its C accelerator, which
    would not let other threads run until the whole body is parsed."""
    decoder = json.JSONDecoder()
    decoder.scan_once = json.scanner.py_make_scanner(decoder)  # type: ignore[attr-defined]
    return decoder


_DECODER: Final = _python_decoder()
