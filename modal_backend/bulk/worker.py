"""Shards of bulk jobs in one container: claimed, embedded by the engine beside it, written.

Everything that touches the Volume runs under one lock, whole, even where its input is cancelled:
a Volume cannot be reloaded while a file of it is open.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from kalm_integrations.bulk import shards
from kalm_integrations.bulk.on_modal import records, worker_pool
from kalm_integrations.bulk.on_modal.records import (
    Attempt,
    Description,
    FolderStore,
    Run,
    ShardRecord,
    Stop,
    run_path,
)
from kalm_integrations.bulk.on_modal.state import Reader
from kalm_integrations.bulk.parts import Part
from kalm_integrations.bulk.shards import ShardBuilder
from kalm_integrations.errors import InvalidInputError, KalmError, TransportError
from kalm_integrations.identity import SpaceIdentity
from modal_backend.bulk.embedding import embed_part
from modal_backend.service import EmbeddingService

log = logging.getLogger(__name__)
T = TypeVar("T")


class Volume(Protocol):
    """The part of Modal's that is needed: to see what others have committed, and the reverse."""

    async def reload(self) -> None: ...
    async def commit(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """Who works: Modal's id, when it was ready, what it costs; and what its engine was not trusted
    for when it started."""

    id: str
    started: float
    gpu: str
    dollars_per_second: float
    failure: KalmError | None = None


VOLUME_SECONDS = 600.0
"""How long one reading or writing of files may take before another container is asked."""


class Worker:
    """Takes shards of the jobs in a Volume, several at a time; `give_way` has another container
    take the inputs from now on."""

    def __init__(
        self,
        volume: Volume,
        root: Path,
        service: EmbeddingService,
        container: Container,
        give_way: Callable[[], Awaitable[None]],
    ) -> None:
        self._volume = volume
        self._root = root / records.JOBS
        self._service = service
        self._container = container
        self._give_way = give_way
        self._lock = asyncio.Lock()
        self._readers: dict[Path, Reader] = {}
        self._over: dict[str, str] = {}
        """Runs that are known to be over, and why: their inputs need no look at the Volume."""

    async def embed_shard(self, job: str, run: str, number: int) -> str:
        """Embed one shard, unless that is done, or not wanted any more; returns what became of it.

        Raises:
            RuntimeError: It failed or took too long, and is to be tried again.
        """
        if run in self._over:
            return self._over[run]
        store = FolderStore(self._root / job)
        claimed = await self._with_files(lambda: self._claim(store, run, number), reload=True)
        if isinstance(claimed, str):
            return claimed
        if claimed is None:
            await self._give_way()
            raise _for_modal(self._container.failure or TransportError("not trusted."))
        limit = asyncio.timeout(worker_pool.seconds_for(claimed.tokens[number]))
        try:
            async with limit:
                await self._embed_claimed(store, run, claimed, number)
        except Exception as error:
            failure: KalmError = TransportError(f"{type(error).__name__}: {error}.")
            if isinstance(error, KalmError):
                failure = error
            if limit.expired():
                failure = TransportError("the shard took longer than its time limit.")
                await self._give_way()  # an engine that hangs would keep the next one too
            log.exception("shard %d of %s failed", number, job)
            if await self._with_files(lambda: self._failed(store, run, number, failure)):
                return "given up"
            raise _for_modal(failure) from None
        # The commit has brought what others wrote: of the last two shards one sees both.
        if await self._with_files(lambda: _all_there(store.folder), commit=False):
            await self._with_files(lambda: _write_manifest(store))
        return "finished"

    async def _embed_claimed(
        self, store: FolderStore, run: str, description: Description, number: int
    ) -> None:
        job, digest = description.job, description.digests[number]
        path = store.folder / records.INPUT / shards.name_of(number)
        part = await self._with_files(lambda: Part.read(path, number, job, digest), commit=False)
        builder = await embed_part(self._service, job, part)
        await self._with_files(lambda: self._finish(store, run, builder))

    async def _with_files(
        self, work: Callable[[], T], *, reload: bool = False, commit: bool = True
    ) -> T:
        async def alone() -> T:
            async with self._lock:
                if reload:
                    await self._volume.reload()
                result = await asyncio.to_thread(work)
                if commit:
                    await self._volume.commit()
                return result

        try:
            async with asyncio.timeout(VOLUME_SECONDS):
                return await asyncio.shield(asyncio.ensure_future(alone()))
        except TimeoutError:
            await self._give_way()
            stuck = TransportError(f"the Volume did not answer within {VOLUME_SECONDS:g} s.")
            raise _for_modal(stuck) from None

    # --- on a thread, with the files

    def _claim(self, store: FolderStore, run: str, number: int) -> Description | str | None:
        """What the job is, an attempt at the shard being noted; or why it is not wanted; None
        where this container cannot."""
        record = self._record(store, run, number)
        if unwanted := self._unwanted(store, run, record):
            return unwanted
        if self._container.failure is not None:
            stopped = self._note_canary(store, run, self._container.failure)
            # It is this container that sees the run's other inputs off: another would be paid.
            return self._ended(run, "the run was stopped") if stopped else None
        description = Description.from_bytes(store.read(records.JOB), records.JOB)
        for reason, message in (
            ("identity", self._differs(description.job.identity)),
            ("limit", self._limit_reached(store, run)),
        ):
            if message:
                records.write_stop(store, run, reason, message)
                return self._ended(run, message)
        if len(record.attempts) >= records.MOST_ATTEMPTS:
            died = f"{len(record.attempts)} containers died, or were taken away"
            record.code, record.message = TransportError.code, f"{died}, while they embedded it."
            self._write(store, number, record)
            return "given up"
        me = self._container
        record.attempts.append(
            Attempt(
                container=me.id,
                started=me.started,
                at=time.time(),
                dollars_per_second=me.dollars_per_second,
            )
        )
        self._write(store, number, record)
        (store.folder / shards.FOLDER).mkdir(exist_ok=True)
        return description

    def _unwanted(self, store: FolderStore, run: str, record: ShardRecord) -> str:
        """Why nothing is to be done; empty if something is."""
        runs = sorted(store.names(records.RUNS))
        if not runs or runs[-1] != run:
            return self._ended(run, "a newer run has taken over")
        if (store.folder / run_path(run, records.STOPPED)).exists():
            return self._ended(run, "the run was stopped")
        if record.shard is not None:
            return "finished before"
        return "given up" if record.code else ""

    def _record(self, store: FolderStore, run: str, number: int) -> ShardRecord:
        """A shard's record; an earlier run's failures do not count."""
        path = records.record_path(number)
        try:
            record = ShardRecord.from_bytes(store.read(path), path)
        except FileNotFoundError:
            return ShardRecord(run=run)
        return record if record.run == run or record.shard is not None else ShardRecord(run=run)

    def _write(self, store: FolderStore, number: int, record: ShardRecord) -> None:
        store.write({records.record_path(number): record.to_bytes()})

    def _limit_reached(self, store: FolderStore, run: str) -> str:
        """Which limit the job has reached; empty if none."""
        limits = Run.from_bytes(store.read(run_path(run, records.RUN)), records.RUN)
        if limits.max_dollars is None and limits.max_hours is None:
            return ""
        state = self._readers.setdefault(store.folder, Reader(store)).read()
        if state is None:
            return ""
        if limits.max_dollars is not None and state.dollars >= limits.max_dollars:
            return f"the job has cost ${state.dollars:,.2f}, and --max-dollars is reached."
        if limits.max_hours is not None and state.seconds >= 3600 * limits.max_hours:
            return f"containers took {state.seconds / 3600:,.2f} h, and --max-hours is reached."
        return ""

    def _finish(self, store: FolderStore, run: str, builder: ShardBuilder) -> None:
        record = self._record(store, run, builder.part.number)
        record.shard = builder.write(store.folder)
        record.finished, record.gpu = time.time(), self._container.gpu
        self._write(store, builder.part.number, record)

    def _failed(self, store: FolderStore, run: str, number: int, failure: KalmError) -> bool:
        """Record it; whether the shard is given up, or done by somebody else."""
        record = self._record(store, run, number)
        if record.shard is not None:
            return True
        if record.attempts:
            record.attempts[-1].error = str(failure)
        hopeless = isinstance(failure, InvalidInputError)
        if hopeless or len(record.attempts) >= records.MOST_ATTEMPTS:
            record.code, record.message = failure.code, failure.message
        self._write(store, number, record)
        return bool(record.code)

    def _note_canary(self, store: FolderStore, run: str, failure: KalmError) -> bool:
        """Record it; whether it was one too many."""
        note = Stop(reason="canary", message=failure.message).to_bytes()
        store.write({run_path(run, f"canary-{self._container.id}.json"): note})
        names = store.names(f"{records.RUNS}/{run}")
        found = [name for name in names if name.startswith("canary-")]
        if len(found) < records.MOST_CANARIES:
            return False
        message = f"{len(found)} containers could not be trusted, the last one: {failure.message}"
        records.write_stop(store, run, "canary", message)
        return True

    def _differs(self, identity: dict[str, object]) -> str:
        expected = SpaceIdentity.from_dict(identity["space"])  # type: ignore[arg-type]
        served = self._service.identity
        if expected == served or self._service.failure is not None:
            return ""
        return f"the containers have {expected.differences(served)}"

    def _ended(self, run: str, why: str) -> str:
        self._over[run] = why
        return why


def _all_there(folder: Path) -> bool:
    shard_files, parts = (folder / name for name in (shards.FOLDER, records.INPUT))
    return len(list(shard_files.glob("part-*"))) == len(list(parts.glob("part-*")))


def _write_manifest(store: FolderStore) -> None:
    """Twice it would be the same."""
    state = Reader(store).read()
    if state is not None and state.complete:
        shards.gather_rejected(store.folder, state.manifest.shards, keep=True)
        state.manifest.write(store.folder)


def _for_modal(failure: KalmError) -> RuntimeError:
    """Ours would need this package, in this version, to be unpickled."""
    return RuntimeError(f"{failure.code}: {failure}")
