"""Text for a terminal: in its width, in its character set, and without anything that steers it."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import Final, TextIO

_PLAIN: Final = str.maketrans({"✓": "+", "✗": "X", "→": ">", "…": "~"})
_WIDEST: Final = 100
_LEAST: Final = 60


def write(text: str, stream: TextIO | None = None) -> None:
    """Print at once, also to a terminal that has no check marks.

    Args:
        text: Without the line's end.
        stream: None is stdout.
    """
    output = stream or sys.stdout
    try:
        "".join(map(chr, _PLAIN)).encode(output.encoding or "ascii")
    except UnicodeEncodeError:
        text = text.translate(_PLAIN)  # rather than a question mark for each of them
    output.write(f"{text}\n")
    output.flush()


def width() -> int:
    """Columns that text may fill: the terminal's, within reason; what is no terminal is wide."""
    return max(_LEAST, min(_WIDEST, shutil.get_terminal_size((_WIDEST, 0)).columns))


def wrapped(text: str, head: str = "") -> str:
    """`text` in the terminal's width, after `head`."""
    return textwrap.fill(
        text,
        width(),
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def printable(text: str) -> str:
    """`text` with its lines kept and every other control character replaced."""
    tidy = "\n".join(" ".join(line.split()) for line in text.splitlines())
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in tidy)
