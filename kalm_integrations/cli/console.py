"""All drawing of the commands, with rich: in the terminal's width and character set."""

from __future__ import annotations

import io
import os
import sys
import textwrap
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.text import Text

from kalm_integrations.terminal import encodable

if TYPE_CHECKING:
    from pydantic import BaseModel

    from kalm_integrations.doctor.base import Finding

_WIDEST: Final = 100
_NARROWEST: Final = 60
_MARGIN: Final = 16
_SLOW: Final = 0.5  # seconds that a finding mentions
_MARKS: Final = {
    "ok": ("✓", "green"),
    "warn": ("!", "yellow"),
    "fail": ("✗", "bold red"),
    "skipped": ("-", "dim"),
}


def stdout() -> Console:
    """A console that writes to stdout."""
    return _console(stderr=False)


def stderr() -> Console:
    """A console that writes to stderr: progress, warnings and errors."""
    return _console(stderr=True)


def print_document(document: BaseModel) -> None:
    """Print the one JSON document of a command."""
    sys.stdout.write(document.model_dump_json(indent=2, exclude_unset=True) + "\n")
    sys.stdout.flush()


def print_finding(console: Console, finding: Finding) -> None:
    """Print a finding of the doctor: mark, name, detail; then what to do."""
    mark, style = _MARKS[finding.status]
    seconds = f" ({finding.seconds:.1f} s)" if finding.seconds >= _SLOW else ""
    first, *more = finding.detail.splitlines() or [""]
    lines = [first + seconds, *more, *([f"→ {finding.remedy}"] if finding.remedy else [])]
    head, margin = f"{mark} {finding.name}".ljust(_MARGIN), " " * _MARGIN
    text = "\n".join(
        textwrap.fill(
            line,
            console.width,
            initial_indent=margin if number else head,
            subsequent_indent=margin,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for number, line in enumerate(lines)
    )
    text = encodable(text, console.encoding)
    console.print(Text(text[:_MARGIN], style, end=""), Text(text[_MARGIN:]), sep="", soft_wrap=True)


def printable(text: str) -> str:
    """`text` with its lines kept and every other control character replaced."""
    tidy = "\n".join(" ".join(line.split()) for line in text.splitlines())
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in tidy)


def prepare_streams() -> None:
    """Open the standard streams that the caller closed; never fail on a character."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by `>&-`
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal can show every character
            stream.reconfigure(errors="replace")


def discard_output() -> None:
    """Drop what is still buffered, or Python would report the same error again when it exits."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    width = console.width if console.is_terminal or "COLUMNS" in os.environ else _WIDEST
    console.width = max(_NARROWEST, min(_WIDEST, width))
    return console
