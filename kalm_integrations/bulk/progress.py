"""How a job goes, for people: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from kalm_integrations.bulk import shards
from kalm_integrations.bulk.manifest import Manifest, Shard
from kalm_integrations.bulk.scan import Scan
from kalm_integrations.terminal import write

_LOGGER: Final = logging.getLogger("kalm_integrations")
_EVERY: Final = 10.0
"""Seconds between two lines."""


class Progress:
    """On stderr: stdout is for what the job says at its end.

    Args:
        dollars_per_second: Of the GPU that computes; None shows no cost.
    """

    def __init__(self, dollars_per_second: float | None) -> None:
        self._dollars = dollars_per_second
        self._bar: Any = None
        self._scanned = 0
        self._rows = self._total = self._tokens = self._rejected = 0
        self._troubles = _Troubles(self._say)
        self._begun = self._said = time.monotonic()

    def scanned(self, rows: int) -> None:
        """Rows that were read before anything is sent."""
        self._scanned += rows
        if self._scanned and self._due():
            self._say(f"reading: {self._scanned:,} rows")

    def begun(self, found: Scan, finished: int, manifest: Manifest) -> None:
        """What there is to do."""
        copies = found.rows - found.bad - found.distinct
        parts = [f"{found.rows:,} rows", f"{found.distinct:,} texts, about {found.tokens:,} tokens"]
        if copies:
            parts.append(f"{copies:,} copies")
        if found.bad:
            parts.append(f"{found.bad:,} cannot be embedded")
        if manifest.complete:
            parts.append("all done before")
        elif finished:
            parts.append(f"{finished:,} rows done before")
        self._say("; ".join(parts))
        self._total, self._rows = found.rows - found.bad, 0
        self._begun = self._said = time.monotonic()
        self._left = self._total - finished
        _LOGGER.addHandler(self._troubles)
        if not manifest.complete and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total, initial=finished, unit=" rows", desc="Embedding", leave=False
            )

    def embedded(self, rows: int, tokens: int, rejected: int) -> None:
        """Rows that have their vectors, or cannot have any."""
        self._rows += rows + rejected
        self._tokens += tokens
        self._rejected += rejected
        if self._bar is not None:
            self._bar.set_postfix_str(self._rates(), refresh=False)
            self._bar.update(rows + rejected)
        elif self._due():
            seconds = time.monotonic() - self._begun
            left = max(0, self._left - self._rows) * seconds / max(1, self._rows)
            self._say(
                f"{self._total - self._left + self._rows:,} of {self._total:,} rows, "
                f"{self._rows / seconds:,.0f} rows/s, {self._rates()}, about {duration(left)} left"
            )

    def written(self, shard: Shard) -> None:
        """Nothing: a bar is enough."""

    def close(self) -> None:
        """Take the bar away."""
        _LOGGER.removeHandler(self._troubles)
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _rates(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._begun)
        said = [f"{self._tokens / seconds:,.0f} tokens/s"]
        if self._dollars is not None and self._rows:
            so_far = seconds * self._dollars
            to_come = so_far * max(0, self._left - self._rows) / self._rows
            said += [f"${so_far:,.2f} so far", f"${to_come:,.2f} to come"]
        for number, what in ((self._rejected, "rejected"), (self._troubles.seen, "warnings")):
            if number:
                said.append(f"{number:,} {what}")
        return ", ".join(said)

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._said < _EVERY:
            return False
        self._said = now
        return True

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        write(f"kalm embed: {text}", sys.stderr)
        if self._bar is not None:
            self._bar.refresh()


class _Troubles(logging.Handler):
    """What the client warns of while it goes on, retries for instance: counted, and now and then
    said. Many requests are under way, and what one of them meets, all do."""

    def __init__(self, say: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._say = say
        self._said = -_EVERY
        self._unsaid = self.seen = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.seen += 1
        now = time.monotonic()
        if now - self._said < _EVERY:
            self._unsaid += 1
            return
        more = f" ({self._unsaid:,} more warnings since the last of these lines)"
        self._say(record.getMessage() + (more if self._unsaid else ""))
        self._said, self._unsaid = now, 0


def counted(number: int, what: str) -> str:
    """A number and what there are so many of: "1 shard", "2,000 shards"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """In words: "2 h 5 min", "40 s"."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def outcome(
    done: Manifest, folder: Path, *, as_json: bool, more: Mapping[str, Any] | None = None
) -> str:
    """What is said of a job that has come to its end.

    Args:
        done: Its record.
        folder: Its output.
        as_json: As one document.
        more: Further fields of that.
    """
    rows, rejected = (sum(getattr(s, n) for s in done.shards) for n in ("rows", "rejected"))
    if as_json:
        content = {
            "output": str(folder),
            "rows": rows,
            "rejected": rejected,
            "tokens": done.tokens,
            "shards": len(done.shards),
            "seconds": done.seconds,
            "dollars": done.dollars,
            "runs": done.runs,
            "identity": done.job.identity,
            **(more or {}),
        }
        return json.dumps(content, indent=2)
    said = (
        f"{counted(rows, 'row')} in {counted(len(done.shards), 'shard')}, {done.tokens:,} tokens, "
        f"{duration(done.seconds)}"
    )
    if done.dollars is not None:
        said += f", ${done.dollars:,.2f}"
    said += f": {folder / shards.FOLDER}"
    if rejected:
        said += f"\n{counted(rejected, 'row')} rejected: {folder / shards.REJECTED} has the reasons"
    return said
