"""Rows on their way from a file: a block of them, and the types of their columns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final

import pyarrow as pa

from kalm_integrations.readers import json_columns

BLOCK_ROWS: Final = 1024


@dataclass(slots=True)
class Block:
    """Consecutive rows of one file.

    Attributes:
        file: Name of the file.
        texts: The text column as Python values; what is not a string cannot be embedded.
        places: Where each row is, for people.
        problems: Why a row is unreadable, by its position in the block.
        digest: Of the bytes that were read for it, or of the file up to its end.
        batch: The columns, from Parquet.
        records: The columns of each row, from other formats; an unreadable row has what is good.
    """

    file: str
    texts: list[Any] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)
    digest: bytes = b""
    batch: pa.RecordBatch | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.places)

    def column(self, name: str, schema: Schema) -> pa.Array:
        """One column with its final type; nulls where a row does not have it."""
        kind = schema.arrow.field(name).type
        if name in schema.partitions:
            return pa.array([schema.partitions[name].get(self.file)] * len(self), kind)
        if self.batch is not None:
            column = self.batch.column(name)
            return column if column.type == kind else column.cast(kind)
        values = [record.get(name) for record in self.records]
        return pa.array(json_columns.encoded(values, name in schema.as_json, kind), kind)

    def table(self, schema: Schema, names: list[str]) -> pa.Table:
        """Columns as a table."""
        fields = [schema.arrow.field(name) for name in names]
        return pa.table([self.column(name, schema) for name in names], schema=pa.schema(fields))


@dataclass(frozen=True, slots=True)
class Schema:
    """Types of all columns, known when everything was read once.

    Attributes:
        arrow: Names and types, in order.
        as_json: Columns that are kept as JSON text, because their values have several types.
        partitions: Hive partitions: values by name and file.
    """

    arrow: pa.Schema
    as_json: frozenset[str] = frozenset()
    partitions: dict[str, dict[str, Any]] = field(default_factory=dict)

    def with_nulls(self) -> Schema:
        """The same for rows of which some lose their values."""
        return replace(self, arrow=pa.schema([nullable(each) for each in self.arrow]))


def nullable(each: pa.Field) -> pa.Field:
    """A column of which some rows lose their values."""
    kind = each.type
    if pa.types.is_struct(kind):
        kind = pa.struct([nullable(child) for child in kind])
    elif pa.types.is_fixed_size_list(kind):
        kind = pa.list_(nullable(kind.value_field), kind.list_size)
    return each.with_type(kind).with_nullable(True)
