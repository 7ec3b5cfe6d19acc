"""How far a job on Modal is, what it costs and how long it takes: from its records alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from kalm_integrations.bulk.manifest import Manifest
from kalm_integrations.bulk.on_modal import job_state, worker_pool
from kalm_integrations.bulk.on_modal.job_state import (
    Attempt,
    Description,
    Failure,
    Record,
    Run,
    Stop,
)
from kalm_integrations.bulk.on_modal.store import Store

_AT_ONCE: Final = 16
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class State:
    """A job at one moment.

    Attributes:
        description: What it is.
        finished: Records by shard.
        runs: How often it was sent.
        run: The newest; None before the first.
        failed: What that gave up.
        trying: Attempts at its other shards that were begun.
        stop: Why it ends early.
    """

    description: Description
    finished: dict[int, Record]
    runs: int = 0
    run: Run | None = None
    failed: dict[int, Failure] = field(default_factory=dict)
    trying: dict[int, list[Attempt]] = field(default_factory=dict)
    stop: Stop | None = None

    @property
    def total(self) -> int:
        """Shards."""
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
    def waiting(self) -> list[int]:
        """Shards that the newest run has still to finish or to give up."""
        sent = self.run.shards if self.run else []
        return [n for n in sent if n not in self.finished and n not in self.failed]

    @property
    def over(self) -> bool:
        """Whether nothing more will come of the newest run."""
        return self.stop is not None or not self.waiting

    @property
    def rows(self) -> int:
        """In finished shards."""
        return sum(record.shard.rows for record in self.finished.values())

    @property
    def rejected(self) -> int:
        """Rows that were not embedded."""
        return sum(record.shard.rejected for record in self.finished.values())

    @property
    def tokens(self) -> int:
        """That were embedded."""
        return sum(record.shard.tokens for record in self.finished.values())

    @property
    def containers(self) -> dict[str, tuple[float, float]]:
        """Of each container that took a shard: seconds of which this is known, and their price."""
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
        """Of containers, from the first shard of this job that they took to the last that they
        recorded. A container may have worked for other jobs before."""
        return sum(seconds for seconds, _ in self.containers.values())

    @property
    def dollars(self) -> float:
        """For these seconds."""
        return sum(dollars for _, dollars in self.containers.values())

    @property
    def dollars_to_come(self) -> float | None:
        """For the tokens that are left and each container's wait at its end; None before the first
        shard is finished."""
        if not self.finished:
            return None
        seen = list(self._seen())
        rate = max(attempt.dollars_per_second for attempt, _ in seen)
        return (
            self.dollars * self._share_left()
            + len(self.containers) * worker_pool.SCALEDOWN_WINDOW * rate
        )

    @property
    def tokens_per_second(self) -> float | None:
        """Of all containers together, as the newest run went so far."""
        mine = self._of_this_run()
        if not mine:
            return None
        return sum(record.shard.tokens for record in mine) / max(_span(mine), 1e-3)

    @property
    def seconds_left(self) -> float | None:
        """At that rate; None before the first shard of the run is finished."""
        mine = self._of_this_run()
        if not mine:
            return None
        tokens = self.description.tokens
        done = sum(tokens[n] for n in (self.run.shards if self.run else []) if n in self.finished)
        return _span(mine) * sum(tokens[n] for n in self.waiting) / max(1, done)

    def manifest(self) -> Manifest:
        """As a local job's, of what is finished; seconds are those of containers."""
        return Manifest(
            job=self.description.job,
            shards=[self.finished[number].shard for number in sorted(self.finished)],
            seconds=self.seconds,
            runs=self.runs,
            dollars=self.dollars,
            complete=self.complete,
        )

    def _share_left(self) -> float:
        tokens = self.description.tokens
        done = sum(tokens[number] for number in self.finished)
        return (sum(tokens) - done) / max(1, done)

    def _of_this_run(self) -> list[Record]:
        sent = self.run.shards if self.run else []
        return [self.finished[number] for number in sent if number in self.finished]

    def _seen(self) -> Iterable[tuple[Attempt, float]]:
        """Attempts, each with the last moment at which its container is known to have lived."""
        for record in self.finished.values():
            yield from ((attempt, attempt.at) for attempt in record.attempts[:-1])
            yield record.attempts[-1], record.finished
        for failure in self.failed.values():
            yield from ((attempt, attempt.at) for attempt in failure.attempts)
        for attempts in self.trying.values():
            yield from ((attempt, attempt.at) for attempt in attempts)


def _span(shards: Sequence[Record]) -> float:
    """Seconds from the first of these shards' beginnings to the last one's end."""
    begun = min(record.attempts[-1].at for record in shards)
    return max(record.finished for record in shards) - begun


class Reader:
    """Reads a job's state again and again, and of its files only what is new."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._description: Description | None = None
        self._known: dict[str, tuple[tuple[int, int], object]] = {}

    def read(self) -> State | None:
        """The state; None while the whole input is not there."""
        if self._description is None:
            try:
                self._description = Description.from_bytes(self._store.read(job_state.JOB))
            except FileNotFoundError:
                return None
        runs = sorted(self._store.names(job_state.RUNS))
        newest = runs[-1] if runs else None
        found = self._store.names(f"{job_state.RUNS}/{newest}") if newest else {}
        # Records last: what was given up meanwhile is no loss, what was finished is.
        done = self._store.names(job_state.RECORDS)
        finished = self._all(job_state.RECORDS, done, "", Record.from_bytes)
        if newest is None or job_state.RUN not in found:
            return State(description=self._description, finished=finished, runs=len(runs))
        folder = f"{job_state.RUNS}/{newest}"
        failed = self._all(folder, found, "failed-", Failure.from_bytes)
        trying = self._all(folder, found, "attempts-", job_state.read_attempts)
        stop = None
        if job_state.STOPPED in found:
            stop = Stop(**json.loads(self._store.read(f"{folder}/{job_state.STOPPED}")))
        return State(
            description=self._description,
            finished=finished,
            runs=len(runs),
            run=Run(**json.loads(self._store.read(f"{folder}/{job_state.RUN}"))),
            failed={n: failure for n, failure in failed.items() if n not in finished},
            trying={n: a for n, a in trying.items() if n not in finished and n not in failed},
            stop=stop,
        )

    def _all(
        self,
        folder: str,
        there: dict[str, tuple[int, int]],
        prefix: str,
        parse: Callable[[bytes], T],
    ) -> dict[int, T]:
        names = [
            name
            for name in sorted(there)
            if name.startswith(prefix) and job_state.number_in(name) >= 0
        ]
        fresh = [n for n in names if self._known.get(f"{folder}/{n}", (None,))[0] != there[n]]
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="kalm-records") as threads:
            read = partial(self._read, folder)
            for name, content in zip(fresh, threads.map(read, fresh), strict=True):
                if content is not None:
                    self._known[f"{folder}/{name}"] = there[name], parse(content)
        known = {name: self._known.get(f"{folder}/{name}") for name in names}
        return {job_state.number_in(name): found[1] for name, found in known.items() if found}  # type: ignore[misc]

    def _read(self, folder: str, name: str) -> bytes | None:
        try:
            return self._store.read(f"{folder}/{name}")
        except FileNotFoundError:  # overwritten in this moment
            return None
