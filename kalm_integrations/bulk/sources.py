"""What there is to embed: rows of Parquet, JSON Lines, CSV and text, in one order, each with its
place; the columns beside the text are kept as they are.

Nothing is guessed: a CSV's columns are text, "007" included; a JSON column in which numbers and
words mix is kept as JSON.
"""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.lines import TEXT_COLUMN

BLOCK_ROWS: Final = 1024
"""Rows that are read at a time."""
PLACE: Final = "place"
"""Column of text files: the file, and the line within it."""

_LINES: Final = (".txt",)
_DOCUMENTS: Final = (".md", ".markdown", ".rst")
_FORMATS: Final = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    **dict.fromkeys(_LINES, "text"),
    **dict.fromkeys(_DOCUMENTS, "text"),
}
_LONGEST_FIELD: Final = 2**27  # bytes of one CSV field; Python's own limit is 128 KiB


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        text: The column that is embedded, whatever it holds.
        columns: All columns by name, the text's too; of a row that could not be read, none.
        place: Where it is, for people.
        unreadable: Why there is no text at all; empty if there is something.
    """

    text: Any
    columns: dict[str, Any]
    place: str
    unreadable: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """Files of one kind, in order.

    Attributes:
        files: In the order of their names.
        kind: "parquet", "json", "csv" or "text".
        text_column: The column that is embedded.
    """

    files: tuple[Path, ...]
    kind: str
    text_column: str

    def name(self, file: Path) -> str:
        """A file's name in manifests: the same from wherever the job is started."""
        base = os.path.commonpath([file.parent.absolute() for file in self.files])
        return file.absolute().relative_to(base).as_posix()

    def rows(self, file: Path) -> Iterator[Row]:
        """The rows of one of the files."""
        readers = {"parquet": _parquet, "json": _json, "csv": _csv, "text": _text}
        try:
            yield from readers[self.kind](file, self.text_column)
        except OSError as error:
            raise ConfigurationError(f"{file}: {error.strerror or error}.") from error
        except pa.ArrowInvalid as error:
            raise ConfigurationError(f"{file} cannot be read: {error}.") from error


def find(pattern: str, text_column: str | None) -> Source:
    """The files that a path, a folder or a glob names.

    Args:
        pattern: Of a folder, all files of the known kinds, hidden ones left out.
        text_column: The column that is embedded; None is "text".

    Raises:
        ConfigurationError: There are none, or of several kinds, or none of the known ones.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if not _hidden(file.relative_to(path))]
        files = sorted(f for f in found if f.suffix.lower() in _FORMATS and f.is_file())
        nothing = f"{pattern} has no {', '.join(_FORMATS)}."
    elif path.is_file():
        files, nothing = [path], ""
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207
        files = [file for file in files if file.is_file()]
        nothing = f"there is no {pattern}."
    if not files:
        raise ConfigurationError(nothing)
    kinds = {file.suffix.lower(): _FORMATS.get(file.suffix.lower()) for file in files}
    unknown = sorted(suffix for suffix, kind in kinds.items() if kind is None)
    if unknown:
        raise ConfigurationError(
            f"{pattern}: files named *{unknown[0]} are none of {', '.join(_FORMATS)}."
        )
    if len(set(kinds.values())) > 1:
        raise ConfigurationError(
            f"{pattern} has files of several kinds ({', '.join(sorted(kinds))}): name those of "
            f"one, '{path / '*.parquet'}' for instance."
        )
    (kind,) = {str(kind) for kind in kinds.values()}
    if kind == "text" and text_column not in (None, TEXT_COLUMN):
        raise ConfigurationError("--text-column is for Parquet, JSON Lines and CSV.")
    return Source(tuple(files), kind, text_column or TEXT_COLUMN)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _decoded(line: bytes) -> str | UnicodeDecodeError:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        return error


def _broken(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8: byte {error.object[error.start]:#04x} at position {error.start}"


def _lacks(name: str, there: Iterable[str]) -> str:
    return (
        f"no column {name!r}, but {', '.join(map(repr, there)) or 'none'}: --text-column names it"
    )


# --- kinds


def _text(file: Path, column: str) -> Iterator[Row]:
    """Plain text has one text a line; a document is one text."""
    if file.suffix.lower() in _DOCUMENTS:
        yield _line(file.read_bytes(), file.name, column)
        return
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            if line.strip():
                yield _line(line.rstrip(b"\r\n"), f"{file.name} line {number}", column)


def _line(content: bytes, place: str, column: str) -> Row:
    text = _decoded(content.removeprefix(b"\xef\xbb\xbf"))
    if isinstance(text, UnicodeDecodeError):
        return Row(None, {PLACE: place}, place, _broken(text))
    return Row(text, {column: text, PLACE: place}, place)


def _json(file: Path, column: str) -> Iterator[Row]:
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            place = f"{file.name} line {number}"
            text = _decoded(line.removeprefix(b"\xef\xbb\xbf"))
            if isinstance(text, UnicodeDecodeError):
                yield Row(None, {}, place, _broken(text))
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield Row(None, {}, place, f"is not JSON: {error}")
                continue
            if not isinstance(value, dict):
                yield Row(None, {}, place, f"is no JSON object, but {type(value).__name__}")
            elif column not in value:
                yield Row(None, value, place, f"has {_lacks(column, value)}")
            else:
                yield Row(value[column], value, place)


def _csv(file: Path, column: str) -> Iterator[Row]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        # What is no UTF-8 comes as lone surrogates, which the check of texts refuses.
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
            table = csv.reader(opened, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
            names = next(table, [])
            if column not in names:
                raise ConfigurationError(f"{file.name} has {_lacks(column, names)}.")
            if len(set(names)) < len(names):
                raise ConfigurationError(f"{file.name} has two columns of one name: {names}.")
            for row, values in enumerate(table, 1):
                place = f"{file.name} row {row}"
                if not values:
                    continue  # a blank line
                if len(values) != len(names):
                    why = f"has {len(values)} fields, and the header {len(names)}"
                    yield Row(None, {}, place, why)
                    continue
                columns = dict(zip(names, values, strict=True))
                yield Row(columns[column], columns, place)
    except csv.Error as error:
        raise ConfigurationError(f"{file.name} is no CSV: {error}.") from error
    finally:
        csv.field_size_limit(before)


def _parquet(file: Path, column: str) -> Iterator[Row]:
    with pq.ParquetFile(file) as table:
        names = table.schema_arrow.names
        if column not in names:
            raise ConfigurationError(f"{file.name} has {_lacks(column, names)}.")
        number = 0
        for batch in table.iter_batches(BLOCK_ROWS):
            columns = {name: _values(batch.column(name)) for name in names}
            for row in range(len(batch)):
                place = f"{file.name} row {number}"
                number += 1
                values = {name: columns[name][row] for name in names}
                text = values[column]
                if isinstance(text, UnicodeDecodeError):
                    yield Row(None, values | {column: None}, place, _broken(text))
                else:
                    yield Row(text, values, place)


def _values(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else _decoded(value) for value in raw]
