"""Files with one text per line, as JSON Lines or plain text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from kalm_integrations.errors import ConfigurationError

TEXT_COLUMN: Final = "text"
_JSON_LINES: Final = (".jsonl", ".ndjson")


def is_json_lines(path: Path) -> bool:
    """Whether the suffix is that of JSON Lines."""
    return path.suffix.lower() in _JSON_LINES


def check_column(column: str | None, *paths: Path | None) -> None:
    """Check that one of `paths` is JSON Lines if `column` is set.

    Raises:
        ConfigurationError: None of them is.
    """
    if column is not None and not any(path and is_json_lines(path) for path in paths):
        raise ConfigurationError("--text-column is for JSON Lines (*.jsonl).")


def column_of(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the location and the value of one field for each line that is not blank.

    Args:
        path: JSON Lines.
        column: The field; None is `TEXT_COLUMN`.

    Raises:
        ConfigurationError: A line is not a JSON object with that field, or the file is unreadable.
    """
    name = column or TEXT_COLUMN
    for location, line in lines_of(path):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{location} is not JSON: {error}.") from None
        if not isinstance(value, dict):
            raise ConfigurationError(f"{location} is no JSON object, but {type(value).__name__}.")
        if name not in value:
            columns = ", ".join(map(repr, value)) or "nothing"
            raise ConfigurationError(
                f"{location} has no {name!r}, but {columns}: --text-column names the text."
            )
        yield location, value[name]


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the location and the text of each line that is not blank.

    Raises:
        ConfigurationError: The file cannot be read, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                location = f"{path.name} line {number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise ConfigurationError(
                        f"{location} is not UTF-8: byte {error.object[error.start]:#04x} at "
                        f"position {error.start}."
                    ) from None
                if text and not text.isspace():
                    yield location, text
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}.") from None
