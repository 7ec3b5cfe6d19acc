"""How a job goes, for people: a bar on a terminal, a line now and then anywhere else. On stderr:
stdout is for the result."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from kalm_integrations.bulk import shards
from kalm_integrations.bulk.local import Progress
from kalm_integrations.bulk.manifest import Manifest
from kalm_integrations.bulk.plan import Plan
from kalm_integrations.terminal import write

_LOGGER: Final = logging.getLogger("kalm_integrations")
_EVERY: Final = 10.0
"""Seconds between two lines."""
_REPEAT: Final = 60.0
"""Seconds until the same warning is shown again."""


class ProgressView(Progress):
    """The view of a job, here or on Modal.

    Args:
        dollars_per_second: Of the GPU that computes; None shows no cost.
    """

    def __init__(self, dollars_per_second: float | None = None) -> None:
        self._dollars = dollars_per_second
        self._bar: Any = None
        self._task: Any = None
        self._scanned = self._rows = self._tokens = self._rejected = self._left = 0
        self._warnings = _Warnings(self.say)
        self._begin = self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Show a line, now."""
        if self._bar is not None:
            self._bar.console.print(f"kalm embed: {text}", markup=False, highlight=False)
        else:
            write(f"kalm embed: {text}", sys.stderr)
        self._last = time.monotonic()

    def show(self, done: int, total: int, text: str) -> None:
        """Show how many rows of all are finished, and the rest of the line."""
        if sys.stderr.isatty():
            if self._bar is None:
                self._open_bar(total)
            self._bar.update(self._task, completed=done, total=total, text=text)
        else:
            self.now_and_then(f"{done:,} of {counted(total, 'row')}, {text}")

    def now_and_then(self, text: str) -> None:
        """Show a line, if the last one was a while ago."""
        if time.monotonic() - self._last >= _EVERY:
            self.say(text)

    def scanned(self, rows: int) -> None:
        self._scanned += rows
        self.now_and_then(f"reading: {counted(self._scanned, 'row')}")

    def begun(self, plan: Plan, finished: int, manifest: Manifest) -> None:
        copies = plan.rows - plan.bad - plan.distinct
        parts = [
            counted(plan.rows, "row"),
            f"{counted(plan.distinct, 'text')}, about {counted(plan.tokens, 'token')}",
        ]
        if copies:
            parts.append(f"{copies:,} {'copy' if copies == 1 else 'copies'}")
        if plan.bad:
            parts.append(f"{plan.bad:,} cannot be embedded")
        if manifest.complete:
            parts.append("all done before")
        elif finished:
            parts.append(f"{counted(finished, 'row')} done before")
        self.say("; ".join(parts))
        self._total, self._finished, self._rows = plan.rows - plan.bad, finished, 0
        self._left = max(0, self._total - finished)
        self._begin = time.monotonic()
        _LOGGER.addHandler(self._warnings)

    def embedded(self, rows: int, tokens: int, rejected: int) -> None:
        self._rows += rows + rejected
        self._tokens += tokens
        self._rejected += rejected
        self.show(min(self._total, self._finished + self._rows), self._total, self._rates())

    def close(self) -> None:
        """Take the bar away."""
        _LOGGER.removeHandler(self._warnings)
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _open_bar(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("Embedding"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("rows, {task.fields[text]}", markup=False),
            console=Console(file=sys.stderr),
            transient=True,
        )
        self._task = self._bar.add_task("", total=total, text="")
        self._bar.start()

    def _rates(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._begin)
        left = max(0, self._left - self._rows) * seconds / max(1, self._rows)
        parts = [
            f"{self._rows / seconds:,.0f} rows/s",
            f"{self._tokens / seconds:,.0f} tokens/s",
            f"about {duration(left)} left",
        ]
        if self._dollars is not None:
            parts += [
                f"${seconds * self._dollars:,.2f} so far",
                f"${left * self._dollars:,.2f} to come",
            ]
        if self._rejected:
            parts.append(f"{self._rejected:,} rejected")
        if self._warnings.seen:
            parts.append(counted(self._warnings.seen, "warning"))
        return ", ".join(parts)


class _Warnings(logging.Handler):
    """The client's warnings while the job runs; the same one at most once a minute."""

    def __init__(self, say: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._say = say
        self._shown: dict[str, float] = {}
        self.seen = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.seen += 1
        text, now = record.getMessage(), time.monotonic()
        if now - self._shown.get(text, -math.inf) >= _REPEAT:
            self._shown[text] = now
            self._say(text)


def counted(number: int, what: str) -> str:
    """A number and its unit: "1 shard", "2,000 shards"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """In words: "2 h 5 min", "40 s"."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def outcome(
    manifest: Manifest, folder: Path, *, as_json: bool, more: Mapping[str, Any] | None = None
) -> str:
    """The result of a job that has come to its end, or to a limit; as one document, with `more`."""
    names = ("rows", "rejected", "truncated", "reused", "tokens", "seconds", "dollars", "runs")
    if as_json:
        content = {
            "output": str(folder),
            "complete": manifest.complete,
            "shards": len(manifest.shards),
            "identity": manifest.job.identity,
            **{name: getattr(manifest, name) for name in names},
            **(more or {}),
        }
        return json.dumps(content, indent=2)
    lines = [
        f"{counted(manifest.rows, 'row')} in {counted(len(manifest.shards), 'shard')}, "
        f"{counted(manifest.tokens, 'token') if manifest.tokens else 'unknown tokens'}, "
        f"{duration(manifest.seconds)}"
        + ("" if manifest.dollars is None else f", ${manifest.dollars:,.2f}")
        + f": {folder / shards.FOLDER}"
    ]
    if manifest.reused:
        lines.append(f"{counted(manifest.reused, 'row')} reused the vector of an earlier output")
    if manifest.truncated:
        lines.append(
            f"{counted(manifest.truncated, 'row')} cut to the model's length: column "
            f"{shards.TRUNCATED!r}"
        )
    if manifest.rejected:
        lines.append(
            f"{counted(manifest.rejected, 'row')} rejected: {folder / shards.REJECTED} has the "
            "reasons"
        )
    return "\n".join(lines)
