"""The types of a job's columns: those of a Parquet file, or the narrowest that all values have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from kalm_integrations.bulk.sources import Source
from kalm_integrations.errors import ConfigurationError

_NOTHING, _JSON = "nothing", "json"
_ARROW: Final = {
    _NOTHING: pa.string(),
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "str": pa.string(),
    _JSON: pa.string(),
}
_LARGEST: Final = 2**63


class Columns:
    """Gathers the types of JSON's columns, row by row.

    The text's own column is text whatever bad rows hold, since its texts are what was embedded.
    """

    def __init__(self, text_column: str) -> None:
        self._text_column = text_column
        self.kinds: dict[str, str] = {}

    def see(self, row: Mapping[str, Any]) -> None:
        """Widen the types so that this row fits."""
        for name, value in row.items():
            kind = "str" if name == self._text_column else _kind(value)
            before = self.kinds.setdefault(name, _NOTHING)
            if before == _NOTHING:
                self.kinds[name] = kind
            elif kind not in (before, _NOTHING):
                self.kinds[name] = "float" if {kind, before} == {"int", "float"} else _JSON

    def schema(self) -> pa.Schema:
        """The columns in the order in which they were first seen."""
        return pa.schema([(name, _ARROW[kind]) for name, kind in self.kinds.items()])

    def values(self, name: str, values: Sequence[Any]) -> list[Any]:
        """`values` of a column, as its type takes them."""
        if self.kinds[name] == _JSON:
            values = [None if v is None else _written(v) for v in values]
        elif name == self._text_column:
            values = [v if v is None or isinstance(v, str) else _written(v) for v in values]
        if _ARROW[self.kinds[name]] == pa.string():
            values = [v if v is None or v.isascii() else _text(v) for v in values]
        return list(values)


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _text(value: str) -> str:
    """What was decoded wrongly, with question marks for it: Arrow takes no lone surrogates."""
    return value.encode(errors="replace").decode()


def _kind(value: Any) -> str:
    match value:
        case None:
            return _NOTHING
        case bool():
            return "bool"
        case int():
            return "int" if -_LARGEST <= value < _LARGEST else _JSON
        case float():
            return "float"
        case str():
            return "str"
        case _:
            return _JSON


def parquet_schema(source: Source) -> pa.Schema:
    """The one schema of all files.

    Raises:
        ConfigurationError: A file has another one, or the text's column cannot be text.
    """
    first, *others = source.files
    schema = pq.read_schema(first).remove_metadata()
    for file in others:
        if not pq.read_schema(file).remove_metadata().equals(schema):
            raise ConfigurationError(f"{file} has other columns, or types, than {first}.")
    names = schema.names
    if source.text_column in names:
        kind = schema.field(source.text_column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or _is_view(kind)):
            raise ConfigurationError(f"{first}: column {source.text_column!r} is {kind}, not text.")
    return schema


def _is_view(kind: pa.DataType) -> bool:
    return str(kind) == "string_view"
