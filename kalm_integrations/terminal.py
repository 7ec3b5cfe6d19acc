"""Lines of text for streams that may lack check marks and arrows."""

from __future__ import annotations

import sys
from typing import Final, TextIO

_PLAIN: Final = str.maketrans({"✓": "+", "✗": "X", "→": ">", "…": "~"})


def encodable(text: str, encoding: str | None) -> str:
    """`text`, with check marks and arrows replaced if `encoding` lacks them."""
    try:
        "".join(map(chr, _PLAIN)).encode(encoding or "ascii")
    except UnicodeEncodeError:
        return text.translate(_PLAIN)
    return text


def write(text: str, stream: TextIO | None = None) -> None:
    """Print a line and flush; replace check marks and arrows that the stream cannot encode."""
    output = stream or sys.stdout
    output.write(f"{encodable(text, output.encoding)}\n")
    output.flush()
