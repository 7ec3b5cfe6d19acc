"""What is said of a job on Modal, as text and as JSON."""

from __future__ import annotations

import sys
import time
from typing import Any, Final

from kalm_integrations.bulk.on_modal.state import State
from kalm_integrations.bulk.progress import counted, duration
from kalm_integrations.terminal import write

_EVERY: Final = 10.0


def phase(state: State, *, alive: bool) -> str:
    """In one word: "complete", "stopped", "failed", "running" or "interrupted"."""
    if state.complete:
        return "complete"
    if state.stop is not None:
        return "stopped"
    if state.over:
        return "failed" if state.failed else "interrupted"
    return "running" if alive else "interrupted"


def as_data(job: str, state: State, *, alive: bool) -> dict[str, Any]:
    """For `--json`."""
    return {
        "job": job,
        "state": phase(state, alive=alive),
        "source": state.description.source,
        "shards": state.total,
        "finished": len(state.finished),
        "failed": [
            {"shard": number, "code": failed.code, "message": failed.message}
            for number, failed in sorted(state.failed.items())
        ],
        "stopped": None
        if state.stop is None
        else {"reason": state.stop.reason, "message": state.stop.message},
        "rows": state.rows,
        "rejected": state.rejected,
        "tokens": state.tokens,
        "tokens_per_second": state.tokens_per_second,
        "seconds_left": state.seconds_left,
        "containers": len(state.containers),
        "container_seconds": state.seconds,
        "dollars": state.dollars,
        "dollars_to_come": None if state.over else state.dollars_to_come,
        "runs": state.runs,
        "identity": state.description.job.identity,
    }


def as_text(job: str, state: State, *, alive: bool) -> str:
    """For people."""
    lines = [f"{job}: {phase(state, alive=alive)}, {line(state)}"]
    for number, failed in sorted(state.failed.items()):
        lines.append(f"shard {number} failed: {failed.code}: {failed.message}")
    if state.stop is not None:
        lines.append(f"stopped ({state.stop.reason}): {state.stop.message}")
    return "\n".join(lines)


def line(state: State) -> str:
    """How far it is."""
    said = f"{len(state.finished):,} of {state.total:,} shards"
    if state.failed:
        said += f", {len(state.failed):,} failed"
    said += f", {state.rows:,} rows, {state.tokens:,} tokens"
    if not state.over and state.tokens_per_second and state.seconds_left is not None:
        said += (
            f", {state.tokens_per_second:,.0f} tokens/s, about {duration(state.seconds_left)} left"
        )
    if state.containers:
        said += f", {counted(len(state.containers), 'container')}, ${state.dollars:,.2f} so far"
    if not state.over and state.dollars_to_come is not None:
        said += f", ${state.dollars_to_come:,.2f} to come"
    return said


class Screen:
    """On stderr: a bar on a terminal, a line now and then anywhere else."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._at = 0.0
        self._rows = 0

    def say(self, text: str) -> None:
        """A line, now."""
        write(f"kalm embed: {text}", sys.stderr)
        self._at = time.monotonic()

    def scanned(self, rows: int) -> None:
        """So many rows more were read."""
        self._rows += rows
        self._now_and_then(f"reading: {self._rows:,} rows")

    def uploaded(self, parts: int, total: int) -> None:
        """So many parts are on Modal."""
        self._now_and_then(f"uploading: {parts:,} of {total:,} parts")

    def fetched(self, files: int, total: int) -> None:
        """So many files were downloaded."""
        self._now_and_then(f"fetching: {files:,} of {total:,} files")

    def watched(self, state: State) -> None:
        """The job is so far."""
        if not sys.stderr.isatty():
            self._now_and_then(line(state))
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=state.description.job.rows, unit=" rows", desc="Embedding", leave=False
            )
        self._bar.set_postfix_str(line(state), refresh=False)
        self._bar.update(state.rows - self._bar.n)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _now_and_then(self, text: str) -> None:
        if time.monotonic() - self._at >= _EVERY:
            self.say(text)
