"""JSON Lines: strict parsing, and the narrowest column types that lose nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import pyarrow as pa

from kalm_integrations.errors import ConfigurationError

_BOOL, _INT, _BIG, _HUGE, _FLOAT, _TEXT, _OTHER = (2**bit for bit in range(7))
_BITS: Final = {type(None): 0, bool: _BOOL, int: _INT, float: _FLOAT, str: _TEXT}
_EXACT: Final = 2**53
"""Largest integer up to which every one is a float64."""
_INT64: Final = 2**63


class ColumnTypes:
    """Collects the types of columns, row by row. The text column is text whatever bad rows hold."""

    def __init__(self, text_column: str) -> None:
        self._text_column = text_column
        self._seen: dict[str, int] = {}

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Widen the types so that these rows fit."""
        seen = self._seen
        for record in records:
            for name, value in record.items():
                bits = _BITS.get(type(value), _OTHER)
                if bits == _INT and not -_EXACT <= value <= _EXACT:
                    bits = _BIG if -_INT64 <= value < _INT64 else _HUGE
                if name not in seen or bits & ~seen[name]:
                    seen[name] = seen.get(name, 0) | bits

    def schema(self) -> tuple[pa.Schema, frozenset[str]]:
        """Types in the order in which columns were first seen, and the columns kept as JSON."""
        self._seen[self._text_column] = _TEXT
        types = {name: _arrow_type(bits) for name, bits in self._seen.items()}
        as_json = frozenset(name for name, kind in types.items() if kind is None)
        fields = [(name, kind or pa.string()) for name, kind in types.items()]
        return pa.schema(fields), as_json


def _arrow_type(bits: int) -> pa.DataType | None:
    if bits in (0, _TEXT):
        return pa.string()
    if bits == _BOOL:
        return pa.bool_()
    if not bits & ~(_INT | _BIG):
        return pa.int64()
    # Above 2**53 not every integer is a float: a column with fractions is kept as JSON then.
    return None if bits & ~(_INT | _FLOAT) else pa.float64()


def encoded(values: list[Any], as_json: bool, kind: pa.DataType) -> list[Any]:
    """Values of a column as its type takes them."""
    if as_json:
        return [None if value is None else _dumped(value) for value in values]
    if kind == pa.string():
        return [
            value if value is None or isinstance(value, str) else _dumped(value) for value in values
        ]
    return values


def _dumped(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isascii() or is_unicode(text) else json.dumps(value)


def is_unicode(text: str) -> bool:
    """Whether a string has no lone surrogates, so that it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def which_byte(value: bytes) -> str:
    """Which byte cannot be decoded, for the end of a message."""
    try:
        value.decode()
    except UnicodeDecodeError as error:
        return f": byte {value[error.start]:#04x} at position {error.start}"
    return ""


def undecodable(text: str, encoding: str) -> str | None:
    """What is wrong with text that was decoded with "surrogateescape"; None if nothing is."""
    if text.isascii() or is_unicode(text):
        return None
    name = {"utf-8": "UTF-8"}.get(encoding, encoding)
    for position, character in enumerate(text):
        if "\udc80" <= character <= "\udcff":
            byte = ord(character) - 0xDC00
            at = len(text[:position].encode(encoding, "surrogateescape"))
            return f"is not {name}: byte {byte:#04x} at position {at}"
    return f"is not {name}: it has a lone surrogate"


def lacks(name: str, there: list[str], option: str = "--text-column") -> str:
    """For messages about a missing column."""
    return f"no column {name!r}, but {', '.join(map(repr, there)) or 'none'}: {option} names it"


class LineParser:
    """Parses one object a line: UTF-8, no key twice, only Unicode in keys and strings.

    Args:
        text_column: Its own strings are checked with all other texts.
    """

    def __init__(self, text_column: str) -> None:
        self._text_column = text_column

    def __call__(self, line: bytes) -> tuple[dict[str, Any], str | None]:
        """The object, as far as it is good, and what is wrong with it."""
        try:
            value = _DECODER.decode(line.decode())
        except UnicodeDecodeError as error:
            return {}, f"is not UTF-8: byte {line[error.start]:#04x} at position {error.start}"
        except _BadObjectError as error:
            return {}, str(error)
        except (ValueError, RecursionError) as error:
            return {}, f"is not JSON: {error}"
        return self.checked(value, escapes=b"\\u" in line)

    def checked(self, value: Any, escapes: bool = True) -> tuple[dict[str, Any], str | None]:
        """An object that was parsed; only where there are escapes can it have surrogates."""
        if not isinstance(value, dict):
            return {}, f"is no JSON object, but {type(value).__name__}"
        problem = None
        if escapes:
            value, problem = self._without_surrogates(value)
        if problem is None and self._text_column not in value:
            problem = f"has {lacks(self._text_column, list(value))}"
        return value, problem

    def _without_surrogates(self, value: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        problem = None
        for name, item in list(value.items()):
            if not is_unicode(name):
                problem = f"has a key with a lone surrogate: {name!r}"
                del value[name]
            elif isinstance(item, str) and not is_unicode(item):
                where = "" if name == self._text_column else f"column {name!r} "
                problem = f"{where}has a lone surrogate: it was decoded wrongly"
                value[name] = None
        return value, problem


class _BadObjectError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _BadObjectError(f"has the key {twice!r} twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0.0:
        raise _BadObjectError(f"has the number {text[:40]}, which no column can hold")
    return value


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite)


def items(content: bytes, name: str) -> Iterator[Any]:
    """The items of one JSON array.

    Raises:
        ConfigurationError: It is not valid; says at which item.
    """
    number = 0
    try:
        text = content.decode("utf-8-sig").strip()
        blank = re.compile(r"[ \t\r\n]*").match
        at = blank(text, 1).end()  # type: ignore[union-attr]
        while text[at : at + 2] != "]":  # with nothing behind it
            if number:
                if text[at : at + 1] != ",":
                    raise ValueError(f"a comma or a closing bracket is missing at character {at}")
                at = blank(text, at + 1).end()  # type: ignore[union-attr]
            number += 1
            value, at = _DECODER.raw_decode(text, at)
            at = blank(text, at).end()  # type: ignore[union-attr]
            yield value
    except (ValueError, RecursionError) as error:
        where = f"{name} item {number}" if number else name
        raise ConfigurationError(f"{where}: is not JSON: {error}.") from error
