"""Rows of Parquet, CSV, JSON Lines and text files, in blocks, for every command that reads texts.

Arrow columns of Parquet stay Arrow columns; only the text column becomes Python strings. Nothing is
guessed or repaired: a row with bytes that are not UTF-8 in any column has a problem that names the
column, and the caller decides what becomes of it. Every block has a digest of the bytes it was
parsed from, by which a second pass detects a changed file.
"""

from __future__ import annotations

import codecs
import csv
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from kalm_integrations import input_files, json_columns
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.input_files import InputFile

TEXT_COLUMN: Final = "text"
PLACE: Final = "place"
"""Column of text files: the file, and the line within it."""
BLOCK_ROWS: Final = 1024
_BLOCK_BYTES: Final = 2**18
_READ_BYTES: Final = 2**16
_LONGEST_FIELD: Final = 2**27  # bytes of one CSV field; Python's own limit is 128 KiB
_BOM: Final = b"\xef\xbb\xbf"


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
            return self.batch.column(name)
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


class Source:
    """Files of one format, read as one corpus in the order of their names.

    Args:
        pattern: A file, a folder, a glob, or an address that fsspec can read.
        text_column: The column with the texts; None is "text".
        encoding: Of CSV and text files; None is UTF-8.
        exclude: The output of a job, whose own files are left out.

    Raises:
        ConfigurationError: There are no such files, or of several formats.
    """

    def __init__(
        self,
        pattern: str,
        text_column: str | None = None,
        encoding: str | None = None,
        exclude: Any = None,
    ) -> None:
        self.files, self.kind = input_files.find(pattern, exclude)
        if self.kind == "text" and text_column not in (None, TEXT_COLUMN):
            raise ConfigurationError("--text-column is for Parquet, JSON Lines and CSV.")
        if encoding is not None and self.kind not in ("csv", "text"):
            raise ConfigurationError("--encoding is for CSV and text files; others are UTF-8.")
        self.encoding = _checked_encoding(encoding)
        self.text_column = text_column or TEXT_COLUMN
        self._types = json_columns.ColumnTypes(self.text_column)
        self._parquet: pa.Schema | None = None

    def blocks(self, file: InputFile) -> Iterator[Block]:
        """Read one of the files.

        Raises:
            ConfigurationError: It cannot be read, or not as its name says.
        """
        reader = {"parquet": _parquet, "json": _json, "csv": _csv, "text": _text}[self.kind]
        try:
            with file.open() as opened:
                for block in reader(self, file, opened):
                    self._types.add(block.records)
                    yield block
        except (OSError, EOFError, zlib.error) as error:
            what = getattr(error, "strerror", None) or error
            raise ConfigurationError(f"{file}: {what}.") from error
        except (pa.ArrowException, UnicodeError) as error:
            raise ConfigurationError(f"{file} cannot be read: {error}.") from error

    def schema(self) -> Schema:
        """Types of all columns; of formats other than Parquet, of the rows read so far.

        Raises:
            ConfigurationError: Parquet files differ, or have no text column, or two of one name.
        """
        found = Schema(*self._types.schema())
        if self.kind == "parquet":
            found = Schema(self._parquet_schema())
        arrow = found.arrow
        for name, (kind, values) in input_files.partitions(self.files).items():
            if name not in arrow.names:
                arrow = arrow.append(pa.field(name, kind))
                found.partitions[name] = values
        return Schema(arrow, found.as_json, found.partitions)

    def _parquet_schema(self) -> pa.Schema:
        for file in self.files if self._parquet is None else ():
            with file.open() as opened:
                schema = _footer(file, opened).schema_arrow.remove_metadata()
            if self._parquet is None:
                _check_parquet(file, schema, self.text_column)
                self._parquet = schema
            elif not schema.equals(self._parquet):
                raise ConfigurationError(
                    f"{file} has other columns, or types, than {self.files[0]}."
                )
        return self._parquet


class Row(NamedTuple):
    """A row: its place, its text, whatever that is, and of JSON Lines and CSV all columns."""

    place: str
    text: Any
    columns: dict[str, Any]


def rows(pattern: str, text_column: str | None = None) -> Iterator[Row]:
    """Read all rows of a corpus.

    Raises:
        ConfigurationError: See `Source`; or a row is unreadable.
    """
    source = Source(pattern, text_column)
    if source.kind == "parquet":
        source.schema()
    for file in source.files:
        for block in source.blocks(file):
            for row, (place, text) in enumerate(zip(block.places, block.texts, strict=True)):
                if row in block.problems:
                    raise ConfigurationError(f"{place} {block.problems[row]}.")
                yield Row(place, text, block.records[row] if block.records else {})


# --- Parquet


def _footer(file: InputFile, opened: io.BufferedReader) -> pq.ParquetFile:
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


def _check_parquet(file: InputFile, schema: pa.Schema, text_column: str) -> None:
    names = schema.names
    if text_column not in names:
        raise ConfigurationError(f"{file.name} has {_lacks(text_column, names)}.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"{file.name} has two columns named {twice[0]!r}: rename one.")
    kind = schema.field(text_column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not _is_text(kind):
        raise ConfigurationError(f"{file}: column {text_column!r} is {kind}, not text.")


def _parquet(source: Source, file: InputFile, opened: io.BufferedReader) -> Iterator[Block]:
    footer = _footer(file, opened)
    metadata, size = footer.metadata, opened.seek(0, io.SEEK_END)
    head = xxhash.xxh3_128(footer.schema_arrow.serialize())
    row = 0
    for number in range(metadata.num_row_groups):
        start, end = _byte_range(metadata.row_group(number), size)
        opened.seek(start)
        content = opened.read(end - start)
        # Parsed from the very bytes that the digest is of: the file may change at any time.
        digest = head.copy()
        digest.update(content)
        group = pq.ParquetFile(_Window(content, start, size), metadata=metadata)
        batches = group.iter_batches(BLOCK_ROWS, row_groups=[number], use_threads=False)
        while (batch := _next_batch(batches, file, row)) is not None:
            places = [f"{file.name} row {row + i}" for i in range(len(batch))]
            row += len(batch)
            batch, problems = _without_broken_text(batch, source.text_column)
            column = batch.column(source.text_column)
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


class _Window(io.RawIOBase):
    """A part of a file in memory, at its place in the file."""

    def __init__(self, content: bytes, start: int, size: int) -> None:
        self._content, self._start, self._size, self._at = memoryview(content), start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> Any:
        start = max(0, self._at - self._start)
        content = self._content[start : start + size if size >= 0 else None]
        self._at += len(content)
        return content


def _without_broken_text(
    batch: pa.RecordBatch, text_column: str
) -> tuple[pa.RecordBatch, dict[int, str]]:
    """Replace values that are not UTF-8 by null; say of which rows and columns."""
    problems: dict[int, str] = {}
    for number, name in enumerate(batch.schema.names):
        column = batch.column(number)
        if not _has_text(column.type) or _is_utf8(column):
            continue
        broken = list(_broken_rows(column, 0, len(column)))
        for row in broken:
            where = "" if name == text_column else f"column {name!r} "
            problems.setdefault(row, f"{where}is not UTF-8{_which_byte(column, row)}")
        pieces, start = [], 0
        for row in broken:
            pieces += [column.slice(start, row - start), pa.nulls(1, column.type)]
            start = row + 1
        whole = pa.concat_arrays([*pieces, column.slice(start)])
        batch = batch.set_column(number, batch.schema.field(number), whole)
    return batch, problems


def _broken_rows(column: pa.Array, start: int, end: int) -> Iterator[int]:
    # A slice of a list is checked with all of its values, unless it is copied.
    if _is_utf8(pa.concat_arrays([column.slice(start, end - start)])):
        return
    if end - start == 1:
        yield start
        return
    middle = (start + end) // 2
    yield from _broken_rows(column, start, middle)
    yield from _broken_rows(column, middle, end)


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


# --- lines


def _json(source: Source, file: InputFile, opened: io.BufferedReader) -> Iterator[Block]:
    digest = xxhash.xxh3_128()
    number, parse = 0, json_columns.LineParser(source.text_column)
    start = opened.peek(64).removeprefix(_BOM).lstrip()
    if file.format_suffix == ".json" and start.startswith(b"["):
        yield from _json_array(source, file, opened)
        return
    while lines := opened.readlines(_BLOCK_BYTES):
        digest.update(b"".join(lines))
        block = Block(file.name, digest=digest.digest())
        if not number:
            lines[0] = lines[0].removeprefix(_BOM)
        records, texts, places = block.records, block.texts, block.places
        for line in lines:
            number += 1
            if line.isspace() or not line:
                continue
            record, problem = parse(line)
            if problem is not None:
                block.problems[len(texts)] = problem
            records.append(record)
            texts.append(record.get(source.text_column))
            places.append(f"{file.name} line {number}")
        yield block


def _json_array(source: Source, file: InputFile, opened: io.BufferedReader) -> Iterator[Block]:
    """One array of objects: read at once."""
    content = opened.read()
    digest = xxhash.xxh3_128_digest(content)
    parse, rows = json_columns.LineParser(source.text_column), []
    for number, item in enumerate(json_columns.items(content, str(file)), 1):
        rows.append((f"{file.name} item {number}", *parse.checked(item)))
    for start in range(0, len(rows), BLOCK_ROWS):
        block = Block(file.name, digest=digest)
        for place, record, problem in rows[start : start + BLOCK_ROWS]:
            _add(block, place, record, source.text_column, problem)
        yield block


def _text(source: Source, file: InputFile, opened: io.BufferedReader) -> Iterator[Block]:
    """Plain text has one text a line; a document is one text."""
    lines, digest = _decoded_lines(source, opened, newline="\n")
    document = file.format_suffix in input_files.DOCUMENTS

    def records() -> Iterator[_Record]:
        for number, line in enumerate(["".join(lines)] if document else lines, 1):
            text = line if document else line.rstrip("\r\n")
            if not (document or text.strip()):
                continue
            place = file.name if document else f"{file.name} line {number}"
            problem = json_columns.undecodable(text, source.encoding)
            record = {PLACE: place} if problem else {source.text_column: text, PLACE: place}
            yield place, record, problem

    yield from _blocks(source, file, records(), digest)


def _csv(source: Source, file: InputFile, opened: io.BufferedReader) -> Iterator[Block]:
    lines, digest = _decoded_lines(source, opened, newline="")
    delimiter = "\t" if file.format_suffix == ".tsv" else ","
    before = csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    number, line = 0, 1

    def records() -> Iterator[_Record]:
        nonlocal number, line
        names = next(rows, [])
        _check_header(source, file, names)
        line = rows.line_num + 1
        for number, values in enumerate(rows, 1):
            line = rows.line_num + 1
            if values:  # a blank line has none
                yield f"{file.name} row {number}", *_csv_record(source, names, values)

    try:
        yield from _blocks(source, file, records(), digest)
    except csv.Error as error:
        why = f"{error}"
        if "end of data" in why or "expected after" in why:
            why = f"a quote is not closed, or not doubled within a field ({error})"
        raise ConfigurationError(f"{file.name} row {number + 1} (line {line}): {why}.") from error
    finally:
        csv.field_size_limit(before)


def _check_header(source: Source, file: InputFile, names: list[str]) -> None:
    for name in names:
        if problem := json_columns.undecodable(name, source.encoding):
            raise ConfigurationError(
                f"{file.name}: the header {problem}. --encoding names the file's encoding, "
                "cp1252 or utf-16 for instance."
            )
    if source.text_column not in names:
        raise ConfigurationError(f"{file.name} has {_lacks(source.text_column, names)}.")
    if len(set(names)) < len(names):
        raise ConfigurationError(f"{file.name} has two columns of one name: {names}.")


def _csv_record(
    source: Source, names: list[str], values: list[str]
) -> tuple[dict[str, Any], str | None]:
    if len(values) != len(names):
        return {}, f"has {len(values)} fields, and the header {len(names)}"
    record: dict[str, Any] = dict(zip(names, values, strict=True))
    if "".join(values).isascii():
        return record, None
    first = None
    for name, value in zip(names, values, strict=True):
        if problem := json_columns.undecodable(value, source.encoding):
            record[name] = None
            where = "" if name == source.text_column else f"column {name!r} "
            first = first or f"{where}{problem}"
    return record, first


def _add(
    block: Block, place: str, record: dict[str, Any], text_column: str, problem: str | None
) -> None:
    if problem:
        block.problems[len(block)] = problem
    block.texts.append(record.get(text_column))
    block.places.append(place)
    block.records.append(record)


_Record = tuple[str, dict[str, Any], str | None]
"""Of one row: its place, its columns, its problem."""


def _blocks(
    source: Source, file: InputFile, records: Iterator[_Record], digest: Callable[[], bytes]
) -> Iterator[Block]:
    """Blocks of `BLOCK_ROWS` rows, and a last one that has the rest."""
    block = Block(file.name)
    for place, record, problem in records:
        _add(block, place, record, source.text_column, problem)
        if len(block) == BLOCK_ROWS:
            block.digest = digest()
            yield block
            block = Block(file.name)
    block.digest = digest()
    yield block


def _decoded_lines(
    source: Source, opened: io.BufferedReader, newline: str
) -> tuple[Iterator[str], Callable[[], bytes]]:
    """Lines, with lone surrogates for bad bytes; and the digest of all bytes read so far."""
    hashed = _Hashed(opened)
    buffered = io.BufferedReader(hashed, _READ_BYTES)
    encoding = "utf-8-sig" if source.encoding == "utf-8" else source.encoding
    lines = io.TextIOWrapper(buffered, encoding, errors="surrogateescape", newline=newline)
    return lines, hashed.digest


class _Hashed(io.RawIOBase):
    """A file whose bytes are hashed as they are read."""

    def __init__(self, opened: io.BufferedReader) -> None:
        self._opened, self._hash = opened, xxhash.xxh3_128()
        self.digest = self._hash.digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._opened.read(len(buffer))
        self._hash.update(content)
        buffer[: len(content)] = content
        return len(content)


def _checked_encoding(encoding: str | None) -> str:
    try:
        "".encode(encoding or "utf-8")
        return codecs.lookup(encoding or "utf-8").name
    except LookupError as error:
        raise ConfigurationError(f"--encoding {encoding}: {error}.") from None


def _lacks(name: str, there: list[str]) -> str:
    shown = ", ".join(map(repr, there)) or "none"
    return f"no column {name!r}, but {shown}: --text-column names it"
