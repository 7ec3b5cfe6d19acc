"""JSON Lines, JSON, CSV and text: rows become Python objects, and columns when all are known."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from typing import Any, Final

import xxhash

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.readers import json_columns
from kalm_integrations.readers.blocks import BLOCK_ROWS, Block
from kalm_integrations.readers.files import DOCUMENTS, InputFile

PLACE: Final = "place"
"""Column of text files: the file, and the line within it."""
_READ_BYTES: Final = 2**16
_LONGEST_FIELD: Final = 2**27  # bytes of one CSV field; Python's own limit is 128 KiB
_BOM: Final = b"\xef\xbb\xbf"
_Record = tuple[str, dict[str, Any], str | None]
"""Of one row: its place, its columns, its problem."""


def read_json(
    file: InputFile, opened: io.BufferedReader, text_column: str, encoding: str
) -> Iterator[Block]:
    """JSON Lines, or one array of objects in a .json file, which is read at once."""
    hashed, parse = _Hashed(opened), json_columns.LineParser(text_column)
    stream = io.BufferedReader(hashed, _READ_BYTES)
    start = stream.peek(64).removeprefix(_BOM).lstrip()
    is_array = file.format_suffix == ".json" and start.startswith(b"[")

    def records() -> Iterator[_Record]:
        if is_array:
            for number, item in enumerate(json_columns.items(stream.read(), str(file)), 1):
                yield f"{file.name} item {number}", *parse.checked(item)
            return
        for number, line in enumerate(stream, 1):
            content = line.removeprefix(_BOM) if number == 1 else line
            if content and not content.isspace():
                yield f"{file.name} line {number}", *parse(content)

    yield from _blocks(file, records(), text_column, hashed.digest)


def read_text(
    file: InputFile, opened: io.BufferedReader, text_column: str, encoding: str
) -> Iterator[Block]:
    """Plain text has one text a line; a document is one text."""
    lines, digest = _decoded_lines(opened, encoding, newline="\n")
    document = file.format_suffix in DOCUMENTS

    def records() -> Iterator[_Record]:
        for number, line in enumerate(["".join(lines)] if document else lines, 1):
            text = line if document else line.rstrip("\r\n")
            if not (document or text.strip()):
                continue
            place = file.name if document else f"{file.name} line {number}"
            problem = json_columns.undecodable(text, encoding)
            record = {PLACE: place} if problem else {text_column: text, PLACE: place}
            yield place, record, problem

    yield from _blocks(file, records(), text_column, digest)


def _blocks(
    file: InputFile, records: Iterator[_Record], text_column: str, digest: Callable[[], bytes]
) -> Iterator[Block]:
    """Blocks of `BLOCK_ROWS` rows, and a last one that has the rest."""
    block = Block(file.name)
    for place, record, problem in records:
        if problem:
            block.problems[len(block)] = problem
        block.texts.append(record.get(text_column))
        block.places.append(place)
        block.records.append(record)
        if len(block) == BLOCK_ROWS:
            block.digest = digest()
            yield block
            block = Block(file.name)
    block.digest = digest()
    yield block


def _decoded_lines(
    opened: io.BufferedReader, encoding: str, newline: str
) -> tuple[Iterator[str], Callable[[], bytes]]:
    """Lines, with lone surrogates for bad bytes; and the digest of all bytes read so far."""
    hashed = _Hashed(opened)
    buffered = io.BufferedReader(hashed, _READ_BYTES)
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
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


def read_csv(
    file: InputFile, opened: io.BufferedReader, text_column: str, encoding: str
) -> Iterator[Block]:
    """A header, and rows with as many fields."""
    lines, digest = _decoded_lines(opened, encoding, newline="")
    delimiter = "\t" if file.format_suffix == ".tsv" else ","
    before = csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    number, line = 0, 1

    def records() -> Iterator[_Record]:
        nonlocal number, line
        names = next(rows, [])
        _check_header(file, names, text_column, encoding)
        line = rows.line_num + 1
        for number, values in enumerate(rows, 1):
            line = rows.line_num + 1
            if values:  # a blank line has none
                yield (
                    f"{file.name} row {number}",
                    *_csv_record(names, values, text_column, encoding),
                )

    try:
        yield from _blocks(file, records(), text_column, digest)
    except csv.Error as error:
        why = f"{error}"
        if "end of data" in why or "expected after" in why:
            why = f"a quote is not closed, or not doubled within a field ({error})"
        raise ConfigurationError(f"{file.name} row {number + 1} (line {line}): {why}.") from error
    finally:
        csv.field_size_limit(before)


def _check_header(file: InputFile, names: list[str], text_column: str, encoding: str) -> None:
    for name in names:
        if problem := json_columns.undecodable(name, encoding):
            raise ConfigurationError(
                f"{file.name}: the header {problem}. --encoding names the file's encoding, "
                "cp1252 or utf-16 for instance."
            )
    if text_column not in names:
        raise ConfigurationError(f"{file.name} has {json_columns.lacks(text_column, names)}.")
    if len(set(names)) < len(names):
        raise ConfigurationError(f"{file.name} has two columns of one name: {names}.")


def _csv_record(
    names: list[str], values: list[str], text_column: str, encoding: str
) -> tuple[dict[str, Any], str | None]:
    if len(values) != len(names):
        return {}, f"has {len(values)} fields, and the header {len(names)}"
    record: dict[str, Any] = dict(zip(names, values, strict=True))
    if "".join(values).isascii():
        return record, None
    first = None
    for name, value in zip(names, values, strict=True):
        if problem := json_columns.undecodable(value, encoding):
            record[name] = None
            where = "" if name == text_column else f"column {name!r} "
            first = first or f"{where}{problem}"
    return record, first
