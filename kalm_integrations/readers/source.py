"""Rows of Parquet, CSV, JSON Lines and text files, in blocks, for every command that reads texts.

Nothing is guessed or repaired: a row with bytes that are not UTF-8 in any column has a problem that
names the column, and the caller decides what becomes of it. Every block has a digest of the bytes
it was parsed from, by which a second pass detects a changed file.
"""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import pyarrow as pa

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.readers import files, lines, parquet
from kalm_integrations.readers.blocks import Block, Schema
from kalm_integrations.readers.files import InputFile
from kalm_integrations.readers.json_columns import ColumnTypes

TEXT_COLUMN: Final = "text"


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
        self.files, self.kind = files.find(pattern, exclude)
        if self.kind == "text" and text_column not in (None, TEXT_COLUMN):
            raise ConfigurationError("--text-column is for Parquet, JSON Lines and CSV.")
        if encoding is not None and self.kind not in ("csv", "text"):
            raise ConfigurationError("--encoding is for CSV and text files; others are UTF-8.")
        self.encoding = _checked_encoding(encoding)
        self.text_column = text_column or TEXT_COLUMN
        self._types = ColumnTypes(self.text_column)
        self._parquet: pa.Schema | None = None

    def blocks(self, file: InputFile) -> Iterator[Block]:
        """Read one of the files.

        Raises:
            ConfigurationError: It cannot be read, or not as its name says.
        """
        reader = {
            "parquet": parquet.read,
            "json": lines.read_json,
            "csv": lines.read_csv,
            "text": lines.read_text,
        }[self.kind]
        try:
            with file.open() as opened:
                for block in reader(file, opened, self.text_column, self.encoding):
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
        for name, (kind, values) in files.partitions(self.files).items():
            if name not in arrow.names:
                arrow = arrow.append(pa.field(name, kind))
                found.partitions[name] = values
        return Schema(arrow, found.as_json, found.partitions)

    def _parquet_schema(self) -> pa.Schema:
        for file in self.files if self._parquet is None else ():
            with file.open() as opened:
                schema = parquet.footer_of(file, opened).schema_arrow.remove_metadata()
            if self._parquet is None:
                parquet.check_schema(file, schema, self.text_column)
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


def _checked_encoding(encoding: str | None) -> str:
    try:
        "".encode(encoding or "utf-8")
        bytes(4).decode(encoding or "utf-8", "surrogateescape")
        return codecs.lookup(encoding or "utf-8").name
    except (LookupError, UnicodeError) as error:
        raise ConfigurationError(f"--encoding {encoding}: {error}.") from None
