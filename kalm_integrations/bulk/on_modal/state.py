"""A job's folder in the Volume, and what it says: how far the job is, its cost, its failures.

```text
jobs/JOB/job.json                 the description; there once the whole input is
         input/part-000000.parquet
         shards/, .rejected-*     as in a local job's output
         records/000000.json      one for each finished shard
         runs/RUN/run.json        what was sent to Modal's queue, and as which call
                  attempts-000000.json, failed-000000.json, canary-CONTAINER.json, stopped.json
         manifest.json, rejected.parquet    at the end, as in a local job's output
```

A run is one time that the job was sent. The newest run counts: inputs of older ones end at once,
so that what failed, or was cancelled, is tried again by a new run and nothing has to be removed.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from pydantic import Field

from kalm_integrations.bulk.manifest import Amount, Job, Manifest, Record, Shard, replace_file
from kalm_integrations.bulk.on_modal import worker_pool

JOBS: Final = "jobs"
JOB: Final = "job.json"
PREPARING: Final = "preparing.json"
INPUT: Final = "input"
RECORDS: Final = "records"
RUNS: Final = "runs"
RUN: Final = "run.json"
CALL: Final = "call.json"
STOPPED: Final = "stopped.json"

MOST_ATTEMPTS: Final = 4
"""Of a shard in one run; containers that died with it count."""
MOST_CANARIES: Final = 3
"""Containers of a run that may find their own vectors wrong: every start is billed."""
_AT_ONCE: Final = 16
R = TypeVar("R", bound=Record)


class Description(Record):
    """`job.json`: the job, tokens and digest of each part, and the input as it was typed."""

    job: Job
    tokens: list[int]
    digests: list[str]
    source: str


class Attempt(Record):
    """One time that a container took a shard.

    Attributes:
        container: Modal's id of it.
        started: When the container was ready, seconds since 1970.
        at: When it took the shard.
        dollars_per_second: Of the container.
        error: What the attempt failed with; empty if the container died.
    """

    container: str
    started: Amount
    at: Amount
    dollars_per_second: Amount
    error: str = ""


class Attempts(Record):
    """`attempts-000000.json`."""

    attempts: list[Attempt] = Field(default_factory=list)


class ShardRecord(Attempts):
    """A finished shard; its last attempt finished it, at `finished`."""

    shard: Shard
    finished: Amount
    gpu: str


class Failure(Attempts):
    """A shard that a run gave up, and why."""

    code: str
    message: str


class Stop(Record):
    """Why a run ends before its shards: "cancelled", "identity", "canary" or "limit"."""

    reason: str
    message: str
    at: Amount = Field(default_factory=time.time)


class Run(Record):
    """`run.json`. The id of a newer run is later in the alphabet."""

    id: str
    shards: list[int]
    max_containers: int
    max_dollars: Amount | None = None
    max_hours: Amount | None = None


class Call(Record):
    """`call.json` and `preparing.json`: Modal's id of a call, and the input as it was typed."""

    call: str
    source: str = ""


def new_run() -> str:
    """An id for a run."""
    return f"{time.time_ns() // 1_000_000:013d}-{secrets.token_hex(2)}"


def job_name(description: Mapping[str, Any]) -> str:
    """A job's name, derived from everything that decides its output."""
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":"))
    return f"embed-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"


def is_job_name(name: str) -> bool:
    """Whether it is one of `job_name`'s."""
    head, _, digits = name.partition("-")
    return head == "embed" and len(digits) == 16 and set(digits) <= set("0123456789abcdef")


def file_of(number: int, kind: str = "") -> str:
    """Name of a shard's record, or of a run's file about it: "attempts" or "failed"."""
    return f"{kind}-{number:06}.json" if kind else f"{number:06}.json"


def number_in(name: str) -> int:
    """The shard that such a file is about; -1 if it is about none."""
    digits = name.removesuffix(".json").rpartition("-")[2]
    return int(digits) if digits.isdecimal() and name.endswith(".json") else -1


class Store(Protocol):
    """A job's folder, mounted or through Modal's API; files by their path within it."""

    def names(self, folder: str) -> dict[str, tuple[int, int]]:
        """Names with size and time of change; empty where there is no such folder."""
        ...

    def read(self, path: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: There is none.
        """
        ...

    def write(self, files: Mapping[str, bytes | Path]) -> None:
        """Write files, from content or from a local file. Others see them on return."""
        ...


class FolderStore:
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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
            replace_file(path, content if isinstance(content, bytes) else content.read_bytes())


@dataclass(frozen=True, kw_only=True)
class State:
    """A job at one moment.

    Attributes:
        description: The job.
        finished: Records by shard.
        runs: How often it was sent.
        run: The newest; None before the first.
        failed: Shards that it gave up.
        trying: Attempts at its other shards.
        stop: Why it ends early.
    """

    description: Description
    finished: dict[int, ShardRecord]
    runs: int = 0
    run: Run | None = None
    failed: dict[int, Failure] = field(default_factory=dict)
    trying: dict[int, Attempts] = field(default_factory=dict)
    stop: Stop | None = None

    @property
    def total(self) -> int:
        """Number of shards."""
        return len(self.description.tokens)

    @property
    def complete(self) -> bool:
        """Whether every shard is finished."""
        return len(self.finished) == self.total

    @property
    def missing(self) -> list[int]:
        """Shards that are not finished."""
        return [number for number in range(self.total) if number not in self.finished]

    @property
    def sent(self) -> list[int]:
        """Shards of the newest run."""
        return self.run.shards if self.run else []

    @property
    def waiting(self) -> list[int]:
        """Shards that the newest run has still to finish or to give up."""
        return [n for n in self.sent if n not in self.finished and n not in self.failed]

    @property
    def over(self) -> bool:
        """Whether the newest run has ended."""
        return self.stop is not None or not self.waiting

    @property
    def containers(self) -> dict[str, tuple[float, float]]:
        """Seconds and price of each container, from the first shard of this job that it took to the
        last that it recorded. It may have worked for other jobs before."""
        spans: dict[str, tuple[float, float, float]] = {}
        for attempt, end in self._seen():
            start, last, _ = spans.get(attempt.container, (attempt.at, end, 0.0))
            rate = attempt.dollars_per_second
            spans[attempt.container] = (min(start, attempt.at), max(last, end), rate)
        return {
            name: (end - start, (end - start) * rate) for name, (start, end, rate) in spans.items()
        }

    @property
    def seconds(self) -> float:
        """Of all containers."""
        return sum(seconds for seconds, _ in self.containers.values())

    @property
    def dollars(self) -> float:
        """For these seconds."""
        return sum(dollars for _, dollars in self.containers.values())

    @property
    def dollars_to_come(self) -> float | None:
        """For the tokens that are left and the idle time at the end; None before the first shard is
        finished."""
        if not self.finished:
            return None
        tokens = self.description.tokens
        done = sum(tokens[number] for number in self.finished)
        rate = max(attempt.dollars_per_second for attempt, _ in self._seen())
        idle = len(self.containers) * worker_pool.SCALEDOWN_WINDOW * rate
        return self.dollars * (sum(tokens) - done) / max(1, done) + idle

    @property
    def speed(self) -> tuple[float, float] | None:
        """Tokens a second of all containers in the newest run, and seconds left at that speed."""
        mine = [self.finished[number] for number in self.sent if number in self.finished]
        if not mine:
            return None
        begun = min(record.attempts[-1].at for record in mine)
        span = max(1e-3, max(record.finished for record in mine) - begun)
        tokens = self.description.tokens
        done = sum(tokens[number] for number in self.sent if number in self.finished)
        left = span * sum(tokens[number] for number in self.waiting) / max(1, done)
        return sum(record.shard.tokens for record in mine) / span, left

    def manifest(self) -> Manifest:
        """As a local job's, with what is finished; seconds are those of containers."""
        manifest = Manifest(
            job=self.description.job,
            shards=[self.finished[number].shard for number in sorted(self.finished)],
            seconds=self.seconds,
            runs=self.runs,
            dollars=self.dollars,
            complete=self.complete,
        )
        manifest.count()
        return manifest

    def _seen(self) -> Iterator[tuple[Attempt, float]]:
        """Attempts, with the last moment at which each container is known to have lived."""
        for record in self.finished.values():
            yield record.attempts[-1], record.finished
        others = [record.attempts[:-1] for record in self.finished.values()]
        others += [each.attempts for each in (*self.failed.values(), *self.trying.values())]
        yield from ((attempt, attempt.at) for attempts in others for attempt in attempts)


class Reader:
    """Reads a job's state again and again, and of its files only what is new."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._description: Description | None = None
        self._known: dict[str, tuple[tuple[int, int], Record]] = {}

    def read(self) -> State | None:
        """The state; None while the input is not complete.

        Raises:
            ConfigurationError: A file is not valid.
        """
        if self._description is None:
            try:
                content = self._store.read(JOB)
            except FileNotFoundError:
                return None
            self._description = Description.from_bytes(content, JOB)
        runs = sorted(self._store.names(RUNS))
        folder = f"{RUNS}/{runs[-1]}" if runs else ""
        files = self._store.names(folder) if runs else {}
        # Records last: a shard that is given up meanwhile does no harm, one that is finished does.
        finished = self._all(RECORDS, self._store.names(RECORDS), "", ShardRecord)
        if RUN not in files:
            return State(description=self._description, finished=finished, runs=len(runs))
        failed = self._all(folder, files, "failed-", Failure)
        trying = self._all(folder, files, "attempts-", Attempts)
        stop = None
        if STOPPED in files:
            stop = Stop.from_bytes(self._store.read(f"{folder}/{STOPPED}"), STOPPED)
        return State(
            description=self._description,
            finished=finished,
            runs=len(runs),
            run=Run.from_bytes(self._store.read(f"{folder}/{RUN}"), RUN),
            failed={n: failure for n, failure in failed.items() if n not in finished},
            trying={n: a for n, a in trying.items() if n not in finished and n not in failed},
            stop=stop,
        )

    def _all(
        self, folder: str, files: dict[str, tuple[int, int]], prefix: str, kind: type[R]
    ) -> dict[int, R]:
        names = [n for n in sorted(files) if n.startswith(prefix) and number_in(n) >= 0]
        if self._description is not None:  # junk is no shard
            names = [n for n in names if number_in(n) < len(self._description.tokens)]
        paths = {name: f"{folder}/{name}" for name in names}
        fresh = [n for n in names if self._known.get(paths[n], (None,))[0] != files[n]]
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="kalm-records") as threads:
            contents = threads.map(self._read, [paths[name] for name in fresh])
            for name, content in zip(fresh, contents, strict=True):
                if content is not None:
                    self._known[paths[name]] = files[name], kind.from_bytes(content, paths[name])
        known = {name: self._known[paths[name]] for name in names if paths[name] in self._known}
        return {number_in(name): record for name, (_, record) in known.items()}  # type: ignore[misc]

    def _read(self, path: str) -> bytes | None:
        try:
            return self._store.read(path)
        except FileNotFoundError:  # overwritten in this moment
            return None
