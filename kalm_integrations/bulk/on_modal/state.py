"""How far a job is, what it costs and what failed, from the records in its folder."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from kalm_integrations.bulk.manifest import Manifest
from kalm_integrations.bulk.on_modal import records, worker_pool
from kalm_integrations.bulk.on_modal.records import Description, Run, ShardRecord, Stop, Store

_AT_ONCE: Final = 16


@dataclass(frozen=True, kw_only=True)
class State:
    """A job at one moment: its shards' records, how often it was sent, the newest run, and why that
    ends early."""

    description: Description
    records: dict[int, ShardRecord] = field(default_factory=dict)
    runs: int = 0
    run: Run | None = None
    stop: Stop | None = None

    @property
    def total(self) -> int:
        """Number of shards."""
        return len(self.description.tokens)

    @cached_property
    def finished(self) -> dict[int, ShardRecord]:
        """Records of finished shards."""
        return {n: record for n, record in self.records.items() if record.shard is not None}

    @cached_property
    def failed(self) -> dict[int, ShardRecord]:
        """Shards that the newest run gave up."""
        return {n: record for n, record in self._open.items() if record.code}

    @cached_property
    def _open(self) -> dict[int, ShardRecord]:
        newest = self.run.id if self.run else None
        return {n: r for n, r in self.records.items() if r.shard is None and r.run == newest}

    @property
    def complete(self) -> bool:
        """Whether every shard is finished."""
        return len(self.finished) == self.total

    @property
    def missing(self) -> list[int]:
        """Shards that are not finished."""
        return [number for number in range(self.total) if number not in self.finished]

    @cached_property
    def waiting(self) -> list[int]:
        """Shards that the newest run has still to finish or to give up."""
        sent = self.run.shards if self.run else []
        return [n for n in sent if n not in self.finished and n not in self.failed]

    @property
    def over(self) -> bool:
        """Whether the newest run has ended."""
        return self.stop is not None or not self.waiting

    @cached_property
    def containers(self) -> dict[str, tuple[float, float]]:
        """Seconds and price of each container, from the first shard of this job that it took to the
        last that it recorded. It may have worked for other jobs before."""
        spans: dict[str, tuple[float, float, float]] = {}
        for record in (*self.finished.values(), *self._open.values()):
            for attempt in record.attempts:
                last = record.shard is not None and attempt is record.attempts[-1]
                end, rate = record.finished if last else attempt.at, attempt.dollars_per_second
                first, latest, _ = spans.get(attempt.container, (attempt.at, end, rate))
                spans[attempt.container] = min(first, attempt.at), max(latest, end), rate
        return {
            name: (end - first, (end - first) * rate) for name, (first, end, rate) in spans.items()
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
        rate = max(r.attempts[-1].dollars_per_second for r in self.finished.values())
        idle = len(self.containers) * worker_pool.SCALEDOWN_WINDOW * rate
        return self.dollars * (sum(tokens) - done) / max(1, done) + idle

    @property
    def speed(self) -> tuple[float, float] | None:
        """Tokens a second of all containers in the newest run, and seconds left at that speed."""
        sent = self.run.shards if self.run else []
        mine = [number for number in sent if number in self.finished]
        if not mine:
            return None
        begun = min(self.finished[number].attempts[-1].at for number in mine)
        span = max(1e-3, max(self.finished[number].finished for number in mine) - begun)
        tokens = self.description.tokens
        done = sum(tokens[number] for number in mine)
        left = span * sum(tokens[number] for number in self.waiting) / max(1, done)
        embedded = sum(s.tokens for n in mine if (s := self.finished[n].shard) is not None)
        return embedded / span, left

    @cached_property
    def manifest(self) -> Manifest:
        """As a local job's, with what is finished; seconds are those of containers."""
        made = (self.finished[number].shard for number in sorted(self.finished))
        manifest = Manifest(
            job=self.description.job,
            shards=[shard for shard in made if shard is not None],
            seconds=self.seconds,
            runs=self.runs,
            dollars=self.dollars,
            complete=self.complete,
        )
        manifest.count()
        return manifest


class Reader:
    """Reads a job's state again and again, and of its records only what is new."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._description: Description | None = None
        self._known: dict[int, tuple[tuple[int, int], ShardRecord]] = {}

    def read(self) -> State | None:
        """The state; None while the input is not complete.

        Raises:
            ConfigurationError: A file is not valid.
        """
        if self._description is None:
            try:
                content = self._store.read(records.JOB)
            except FileNotFoundError:
                return None
            self._description = Description.from_bytes(content, records.JOB)
        run = stop = None
        runs = sorted(self._store.names(records.RUNS))
        if runs:
            folder = f"{records.RUNS}/{runs[-1]}"
            files = self._store.names(folder)
            if records.RUN in files:
                run = Run.from_bytes(self._store.read(f"{folder}/{records.RUN}"), records.RUN)
            if (name := records.STOPPED) in files:
                stop = Stop.from_bytes(self._store.read(f"{folder}/{name}"), name)
        return State(
            description=self._description,
            records=self._records(len(self._description.tokens)),
            runs=len(runs),
            run=run,
            stop=stop,
        )

    def _records(self, total: int) -> dict[int, ShardRecord]:
        found = {}
        for name, version in self._store.names(records.RECORDS).items():
            number = int(digits) if (digits := name.removesuffix(".json")).isdecimal() else total
            if number < total:  # junk is no shard
                found[number] = version
        fresh = [n for n, version in found.items() if self._known.get(n, (None,))[0] != version]
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="kalm-records") as threads:
            for number, record in zip(fresh, threads.map(self._record, fresh), strict=True):
                if record is not None:
                    self._known[number] = found[number], record
        return {number: record for number, (_, record) in sorted(self._known.items())}

    def _record(self, number: int) -> ShardRecord | None:
        path = records.record_path(number)
        try:
            return ShardRecord.from_bytes(self._store.read(path), path)
        except FileNotFoundError:  # overwritten in this moment
            return None
