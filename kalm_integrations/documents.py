"""The documents of a folder: its Markdown and text files, without what is hidden or installed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

SUFFIXES: Final = (".md", ".markdown", ".txt", ".rst")

_NOT_DOCUMENTS: Final = frozenset({"node_modules", "site-packages", "venv", "__pycache__"})
_SHOWN: Final = 5  # files that could not be read


def files(folder: Path) -> Iterator[Path]:
    """In order of their names, folder by folder."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if name[0] != "." and name not in _NOT_DOCUMENTS
        )
        for name in sorted(names):
            path = Path(parent, name)
            # a named pipe would be waited for
            if name.lower().endswith(SUFFIXES) and name[0] != "." and path.is_file():
                yield path


def left_out(unread: Sequence[str]) -> str:
    """What to say, after all else, of files that could not be read."""
    if not unread:
        return ""
    more = len(unread) - _SHOWN
    shown = [*unread[:_SHOWN], f"{more} more"] if more > 0 else unread
    return f"; left out: {', '.join(shown)}"
