"""Parquet: Arrow columns stay Arrow columns; only the text column becomes Python strings."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.readers import json_columns
from kalm_integrations.readers.blocks import BLOCK_ROWS, Block, nullable
from kalm_integrations.readers.files import InputFile


def footer_of(file: InputFile, opened: io.BufferedReader) -> pq.ParquetFile:
    """Open it; what is broken is refused by name."""
    size = opened.seek(0, io.SEEK_END)
    opened.seek(0)
    if size == 0:
        raise ConfigurationError(f"{file} is empty: it is not Parquet.")
    try:
        return pq.ParquetFile(opened)
    except (pa.ArrowException, OSError) as error:
        opened.seek(0)
        why = "is truncated" if opened.read(4) == b"PAR1" else "is not Parquet"
        raise ConfigurationError(f"{file} {why}, or damaged: {error}.") from error


def check_schema(file: InputFile, schema: pa.Schema, text_column: str) -> None:
    """Refuse columns that cannot be embedded."""
    names = schema.names
    if text_column not in names:
        raise ConfigurationError(f"{file.name} has {json_columns.lacks(text_column, names)}.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"{file.name} has two columns named {twice[0]!r}: rename one.")
    kind = schema.field(text_column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not _is_text(kind):
        raise ConfigurationError(f"{file}: column {text_column!r} is {kind}, not text.")


def read(file: InputFile, opened: io.BufferedReader, text_column: str, _: str) -> Iterator[Block]:
    """Blocks of rows."""
    footer = footer_of(file, opened)
    metadata, size = footer.metadata, opened.seek(0, io.SEEK_END)
    head = xxhash.xxh3_128(footer.schema_arrow.serialize())
    leaves = (metadata.schema.column(number) for number in range(metadata.num_columns))
    has_int96 = any(leaf.physical_type == "INT96" for leaf in leaves)
    row = 0
    for number in range(metadata.num_row_groups):
        start, end = _byte_range(metadata.row_group(number), size)
        opened.seek(start)
        content = opened.read(end - start)
        # Parsed from the very bytes that the digest is of: the file may change at any time.
        digest = head.copy()
        digest.update(content)
        options = [None, "us"] if has_int96 else [None]
        readers = [
            pq.ParquetFile(
                _Window(content, start, size), metadata=metadata, coerce_int96_timestamp_unit=unit
            ).iter_batches(BLOCK_ROWS, row_groups=[number], use_threads=False)
            for unit in options
        ]
        while (batch := _next_batch(readers[0], file, row)) is not None:
            coarse = _next_batch(readers[1], file, row) if has_int96 else batch
            places = [f"{file.name} row {row + i}" for i in range(len(batch))]
            row += len(batch)
            batch, problems = _checked(batch, coarse, text_column)
            column = batch.column(text_column)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            yield Block(file.name, column.to_pylist(), places, problems, digest.digest(), batch)


def _next_batch(batches: Iterator[Any], file: InputFile, row: int) -> Any:
    try:
        return next(batches, None)
    except pa.ArrowException as error:
        raise ConfigurationError(f"{file} cannot be read from row {row:,} on: {error}.") from error


def _byte_range(group: Any, size: int) -> tuple[int, int]:
    starts, ends = [], []
    for number in range(group.num_columns):
        chunk = group.column(number)
        start = chunk.data_page_offset
        if chunk.has_dictionary_page and chunk.dictionary_page_offset:
            start = min(start, chunk.dictionary_page_offset)
        starts.append(start)
        ends.append(start + chunk.total_compressed_size)
    # Some old writers leave the header of the last page out of the size: Arrow reads 100 more.
    return min(starts, default=0), min(size, max(ends, default=0) + 100)


class _Window(io.BytesIO):
    """A part of a file in memory, at its place in the file."""

    def __init__(self, content: bytes, start: int, size: int) -> None:
        super().__init__(content)
        self._start, self._size = start, size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._size}[whence]
        super().seek(max(0, place - self._start))
        return place

    def tell(self) -> int:
        return super().tell() + self._start


def _checked(
    batch: pa.RecordBatch, coarse: pa.RecordBatch, text_column: str
) -> tuple[pa.RecordBatch, dict[int, str]]:
    """Replace values that are not UTF-8, or INT96 dates that wrapped around, by null; say of which
    rows and columns.

    Args:
        batch: Rows as they are kept.
        coarse: The same rows, with INT96 as microseconds.
        text_column: Of the texts.
    """
    problems: dict[int, str] = {}
    for number, field in enumerate(batch.schema):
        column = batch.column(number)
        where = "" if field.name == text_column else f"column {field.name!r} "
        if _has_text(field.type) and not _is_utf8(column):
            column = _decoded(column)
            broken = list(_rows_where_not(_is_utf8, column))
            reasons = [f"{where}is not UTF-8{_which_byte(column, row)}" for row in broken]
        elif not (fits := partial(_fits, kind=field.type))(coarse.column(number)):
            broken = list(_rows_where_not(fits, coarse.column(number)))
            reason = f"{where}has an INT96 date outside of 1677 to 2262: write it as microseconds"
            reasons = [reason] * len(broken)
        else:
            continue
        problems = dict(zip(broken, reasons, strict=True)) | problems
        if column.type == field.type != nullable(field).type:
            column = column.cast(nullable(field).type)
        pieces, start = [], 0
        for row in broken:
            pieces += [column.slice(start, row - start), pa.nulls(1, column.type)]
            start = row + 1
        whole = pa.concat_arrays([*pieces, column.slice(start)])
        after = nullable(field)
        batch = batch.set_column(
            number, after, whole if whole.type == after.type else whole.cast(after.type)
        )
    return batch, problems


def _rows_where_not(
    is_good: Callable[[pa.Array], bool], column: pa.Array, start: int = 0
) -> Iterator[int]:
    # A slice of a list is checked with all of its values, unless it is copied.
    if is_good(pa.concat_arrays([column])):
        return
    if len(column) == 1:
        yield start
        return
    middle = len(column) // 2
    yield from _rows_where_not(is_good, column.slice(0, middle), start)
    yield from _rows_where_not(is_good, column.slice(middle), start + middle)


def _fits(column: pa.Array, kind: pa.DataType) -> bool:
    try:
        return column.type == kind or column.cast(kind) is not None
    except pa.ArrowInvalid:
        return False


def _decoded(column: pa.Array) -> pa.Array:
    """Without dictionaries, where Arrow can restore them: all rows share their values."""
    try:
        column.slice(0, 0).cast(_plain(column.type)).cast(column.type)
        return column.cast(_plain(column.type))
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return column


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(_plain(kind.value_type)))
    return kind


def _is_utf8(column: pa.Array) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        return "UTF8" not in str(error)
    return True


def _which_byte(column: pa.Array, row: int) -> str:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return ""
    wide = pa.types.is_large_string(column.type)
    (value,) = column.slice(row, 1).view(pa.large_binary() if wide else pa.binary()).to_pylist()
    return json_columns.which_byte(value)


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view"
    )


def _has_text(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        return _has_text(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_has_text(kind.field(number).type) for number in range(kind.num_fields))
    if pa.types.is_map(kind):
        return _has_text(kind.key_type) or _has_text(kind.item_type)
    return _has_text(kind.value_type) if hasattr(kind, "value_type") else _is_text(kind)
