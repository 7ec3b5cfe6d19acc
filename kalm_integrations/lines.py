"""Files with one text a line: JSON Lines, or plain text. Each text keeps its place there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from kalm_integrations.errors import ConfigurationError

TEXT_COLUMN: Final = "text"
_JSON_LINES: Final = (".jsonl", ".ndjson")


def is_json_lines(path: Path) -> bool:
    """Whether each line is an object, by the file's name."""
    return path.suffix.lower() in _JSON_LINES


def check_column(column: str | None, *paths: Path | None) -> None:
    """Refuse a column that none of these files has a use for.

    Raises:
        ConfigurationError: None of them is JSON Lines.
    """
    if column is not None and not any(path and is_json_lines(path) for path in paths):
        raise ConfigurationError("--text-column is for JSON Lines (*.jsonl).")


def column_of(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    """The value of one field, of each line that is not blank, with its place.

    Args:
        path: JSON Lines.
        column: The field; None is `TEXT_COLUMN`.

    Raises:
        ConfigurationError: A line is no JSON object with that field, or the file cannot be read.
    """
    name = column or TEXT_COLUMN
    for place, line in lines_of(path):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{place} is not JSON: {error}.") from None
        if not isinstance(value, dict):
            raise ConfigurationError(f"{place} is no JSON object, but {type(value).__name__}.")
        if name not in value:
            there = ", ".join(map(repr, value)) or "nothing"
            raise ConfigurationError(
                f"{place} has no {name!r}, but {there}: --text-column names the text."
            )
        yield place, value[name]


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with its place.

    Raises:
        ConfigurationError: The file cannot be read, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{path.name} line {number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise ConfigurationError(
                        f"{place} is not UTF-8: byte {error.object[error.start]:#04x} at "
                        f"position {error.start}."
                    ) from None
                if text and not text.isspace():
                    yield place, text
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}.") from None
