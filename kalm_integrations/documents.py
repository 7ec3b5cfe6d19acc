"""The documents of a folder: Markdown and text files that are neither hidden nor installed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

SUFFIXES: Final = (".md", ".markdown", ".txt", ".rst")

_NOT_DOCUMENTS: Final = frozenset({"node_modules", "site-packages", "venv", "__pycache__"})
_MAX_NAMES: Final = 5  # files that could not be read


def files(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> Iterator[Path]:
    """Yield files with one of these `suffixes`, in order of their names, folder by folder."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if name[0] != "." and name not in _NOT_DOCUMENTS
        )
        for name in sorted(names):
            path = Path(parent, name)
            # opening a named pipe would block
            if name.lower().endswith(suffixes) and name[0] != "." and path.is_file():
                yield path


def unread(name: str, error: OSError | UnicodeDecodeError) -> str:
    """Describe a file that could not be read."""
    return f"{name} ({error.strerror if isinstance(error, OSError) else 'not UTF-8'})"


def left_out(files: Sequence[str]) -> str:
    """The end of a message: which files could not be read."""
    if not files:
        return ""
    more = len(files) - _MAX_NAMES
    names = [*files[:_MAX_NAMES], f"{more} more"] if more > 0 else files
    return f"; left out: {', '.join(names)}"
