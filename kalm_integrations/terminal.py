"""Text for a terminal: its width, its character set, no control characters."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import Final, TextIO

_PLAIN: Final = str.maketrans({"✓": "+", "✗": "X", "→": ">", "…": "~"})


def write(text: str, stream: TextIO | None = None) -> None:
    """Print a line and flush; replace check marks and arrows that the stream cannot encode."""
    output = stream or sys.stdout
    try:
        "".join(map(chr, _PLAIN)).encode(output.encoding or "ascii")
    except UnicodeEncodeError:
        text = text.translate(_PLAIN)
    output.write(f"{text}\n")
    output.flush()


def width() -> int:
    """The terminal's columns, from 60 to 100; 100 without a terminal."""
    return max(60, min(100, shutil.get_terminal_size((100, 0)).columns))


def wrapped(text: str, head: str = "") -> str:
    """`head` and `text`, wrapped to `width` and indented below `head`."""
    return textwrap.fill(
        text,
        width(),
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def printable(text: str) -> str:
    """`text` with its line breaks, without other control characters."""
    lines = "\n".join(" ".join(line.split()) for line in text.splitlines())
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in lines)
