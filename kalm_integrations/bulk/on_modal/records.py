"""A job's folder in the Volume: its files and their records.

```text
jobs/JOB/job.json                 the description; there once the whole input is
         input/part-000000.parquet
         shards/, .rejected-*     as in a local job's output
         records/000000.json      one for each shard that was begun: attempts, failure, shard
         runs/RUN/run.json        what was sent to Modal's queue, and as which call
                  canary-CONTAINER.json, stopped.json
         manifest.json, rejected.parquet    at the end, as in a local job's output
```

A run is one time that the job was sent. The newest run counts: inputs of older ones end at once,
so that what failed, or was cancelled, is tried again by a new run and nothing has to be removed.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from pydantic import Field

from kalm_integrations.bulk.manifest import Amount, Job, Record, Shard, written_whole
from kalm_integrations.bulk.on_modal import worker_pool

JOBS: Final = "jobs"
JOB: Final = "job.json"
PREPARING: Final = "preparing.json"
INPUT: Final = "input"
RECORDS: Final = "records"
RUNS: Final = "runs"
RUN: Final = "run.json"
STOPPED: Final = "stopped.json"

MOST_ATTEMPTS: Final = 4
"""Of a shard in one run; containers that died with it count."""
MOST_CANARIES: Final = 3
"""Containers of a run that may find their own vectors wrong: every start is billed."""


class Description(Record):
    """`job.json`: the job, tokens and digest of each part, and the input as it was typed."""

    job: Job
    tokens: list[int]
    digests: list[str]
    source: str


class Attempt(Record):
    """One time that a container, ready since `started`, took a shard."""

    container: str
    started: Amount
    at: Amount
    dollars_per_second: Amount
    error: str = ""
    """What it failed with; empty if the container died."""


class ShardRecord(Record):
    """A shard that was begun: the attempts of the run that has it, and what became of it."""

    run: str = ""
    attempts: list[Attempt] = Field(default_factory=list)
    shard: Shard | None = None
    """Once it is finished, at `finished`, by the last attempt."""
    finished: Amount = 0.0
    gpu: str = ""
    code: str = ""
    """Of the error for which the run gave it up."""
    message: str = ""


class Stop(Record):
    """Why a run ends before its shards: "cancelled", "identity", "canary" or "limit"."""

    reason: str
    message: str
    at: Amount = Field(default_factory=time.time)


class Run(Record):
    """`run.json`, with Modal's id of the call. The id of a newer run is later in the alphabet."""

    id: str
    shards: list[int]
    max_containers: int
    max_dollars: Amount | None = None
    max_hours: Amount | None = None
    call: str = ""


class Preparation(Record):
    """`preparing.json`: Modal's id of the call, and the input as it was typed."""

    call: str
    source: str


def new_run() -> str:
    """An id for a run."""
    return f"{time.time_ns() // 1_000_000:013d}-{secrets.token_hex(2)}"


def job_name(description: Mapping[str, Any]) -> str:
    """A job's name, derived from everything that decides its output."""
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":"))
    return f"embed-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"


def is_job_name(name: str) -> bool:
    """Whether it is one of `job_name`'s."""
    return re.fullmatch("embed-[0-9a-f]{16}", name) is not None


def record_path(number: int) -> str:
    """Of a shard's record."""
    return f"{RECORDS}/{number:06}.json"


def run_path(run: str, name: str) -> str:
    """Of a run's file."""
    return f"{RUNS}/{run}/{name}"


def write_stop(store: Store, run: str, reason: str, message: str) -> None:
    """End a run before its shards; finished ones stay."""
    stop = Stop(reason=reason, message=message)
    store.write({run_path(run, STOPPED): stop.to_bytes()})


class Store(Protocol):
    """A job's folder, mounted or through Modal's API; files by their path within it."""

    def names(self, folder: str) -> dict[str, tuple[int, int]]:
        """Names with size and time of change; empty where there is no such folder."""
        ...

    def read(self, path: str) -> bytes:
        """A file's content, or `FileNotFoundError`."""
        ...

    def write(self, files: Mapping[str, bytes | Path]) -> None:
        """Write files, from content or from a local file. Others see them on return."""
        ...


class FolderStore:
    """A folder of this machine; `commit` shows others what is written to it."""

    def __init__(self, folder: Path, commit: Callable[[], object] = lambda: None) -> None:
        self.folder, self._commit = folder, commit

    def names(self, folder: str) -> dict[str, tuple[int, int]]:
        try:
            found = [(path, path.stat()) for path in (self.folder / folder).iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {path.name: (stat.st_size, stat.st_mtime_ns) for path, stat in found}

    def read(self, path: str) -> bytes:
        return (self.folder / path).read_bytes()

    def write(self, files: Mapping[str, bytes | Path]) -> None:
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as file:
                file.write(content if isinstance(content, bytes) else content.read_bytes())
        self._commit()


def send_run(app_name: str, environment_name: str | None, store: Store, job: str, run: Run) -> None:
    """Put a run's shards into Modal's own queue, which starts containers, hands out shards, and
    tries again. The run counts before the first of them starts."""
    import modal

    path, count = run_path(run.id, RUN), len(run.shards)
    store.write({path: run.to_bytes()})
    if not count:
        return
    found = modal.Cls.from_name(app_name, worker_pool.CLASS, environment_name=environment_name)
    workers = found()
    with warnings.catch_warnings():
        # Modal's own class method calls what Modal deprecated for functions. Not through
        # `with_options`: each set of arguments is a variant with snapshots of its own.
        warnings.filterwarnings("ignore", ".*update_autoscaler")
        workers.update_autoscaler(max_containers=run.max_containers)
    call = workers.embed_shard.experimental_spawn_map([job] * count, [run.id] * count, run.shards)
    run.call = call.object_id
    store.write({path: run.to_bytes()})
