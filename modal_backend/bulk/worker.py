"""Shards of bulk jobs in one container: claimed, embedded by the engine beside it, written.

Everything that touches the Volume runs under one lock, whole, even where its input is cancelled:
a Volume cannot be reloaded while a file of it is open.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import pyarrow as pa

from kalm_integrations.bulk import parts, shards
from kalm_integrations.bulk.manifest import Job
from kalm_integrations.bulk.on_modal import job_state, worker_pool
from kalm_integrations.bulk.on_modal.job_state import Attempt, Description, Record, Stop
from kalm_integrations.bulk.on_modal.state import Reader
from kalm_integrations.bulk.on_modal.store import FolderStore
from kalm_integrations.bulk.shards import Filling
from kalm_integrations.errors import (
    InvalidInputError,
    KalmError,
    TransportError,
)
from kalm_integrations.identity import SpaceIdentity
from modal_backend.bulk.embedding import embed
from modal_backend.service import EmbeddingService

log = logging.getLogger(__name__)
T = TypeVar("T")


class Volume(Protocol):
    """The part of Modal's that is needed."""

    async def reload(self) -> None:
        """See what others have committed."""
        ...

    async def commit(self) -> None:
        """Have others see what was written here."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """Who works.

    Attributes:
        id: Modal's.
        started: When it was ready, seconds since 1970.
        gpu: What it was asked to have.
        dollars_per_second: Of it.
        failure: What its engine was not trusted for when it started.
    """

    id: str
    started: float
    gpu: str
    dollars_per_second: float
    failure: KalmError | None = None


VOLUME_SECONDS = 600.0
"""How long one reading or writing of files may take before another container is asked."""


class Worker:
    """Takes shards, several at a time.

    Args:
        volume: Of the jobs.
        root: Where it is mounted.
        service: With the engine.
        container: This one.
        give_way: Has another container take the inputs from now on.
    """

    def __init__(
        self,
        volume: Volume,
        root: Path,
        service: EmbeddingService,
        container: Container,
        give_way: Callable[[], Awaitable[None]],
    ) -> None:
        self._volume = volume
        self._root = root / job_state.JOBS
        self._service = service
        self._container = container
        self._give_way = give_way
        self._lock = asyncio.Lock()
        self._over: dict[str, str] = {}
        """Runs that are known to be over, and why: their inputs need no look at the Volume."""

    async def embed_shard(self, job: str, run: str, number: int) -> str:
        """Embed one shard, unless that is done, or not wanted any more.

        Returns:
            What became of it, for the log.

        Raises:
            RuntimeError: It failed or took too long, and is to be tried again.
        """
        if run in self._over:
            return self._over[run]
        folder = self._root / job
        claimed = await self._with_files(lambda: self._claim(folder, run, number), reload=True)
        if isinstance(claimed, str):
            return claimed
        if claimed is None:
            await self._give_way()
            raise _for_modal(self._container.failure or TransportError("not trusted."))
        limit = asyncio.timeout(worker_pool.seconds_for(claimed.tokens[number]))
        try:
            async with limit:
                await self._embed_claimed(folder, run, claimed.job, number)
        except Exception as error:
            failure = error if isinstance(error, KalmError) else _unexpected(error)
            if limit.expired():
                failure = TransportError("the shard took longer than its time limit.")
                await self._give_way()  # an engine that hangs would keep the next one too
            log.exception("shard %d of %s failed", number, job)
            if await self._with_files(lambda: self._failed(folder, run, number, failure)):
                return "given up"
            raise _for_modal(failure) from None
        # The commit has brought what others wrote: of the last two shards one sees both.
        if await self._with_files(lambda: _all_there(folder), commit=False):
            await self._with_files(lambda: _write_manifest(folder))
        return "finished"

    async def _embed_claimed(self, folder: Path, run: str, job: Job, number: int) -> None:
        path = folder / job_state.INPUT / shards.name_of(number)
        part = await self._with_files(lambda: parts.read(path, job.text_column), commit=False)
        filling = await embed(self._service, job, number, part)
        await self._with_files(lambda: self._finish(folder, run, job, filling, part.columns))

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

    def _claim(self, folder: Path, run: str, number: int) -> Description | str | None:
        """What the job is, an attempt at the shard being noted; or why it is not wanted; None
        where this container cannot."""
        store, here = FolderStore(folder), f"{job_state.RUNS}/{run}"
        if unwanted := self._unwanted(store, run, number):
            return unwanted
        if self._container.failure is not None:
            stopped = self._note_canary(store, here, self._container.failure)
            # It is this container that sees the run's other inputs off: another would be paid.
            return self._ended(run, "the run was stopped") if stopped else None
        description = Description.from_bytes(store.read(job_state.JOB))
        if self._service.failure is None and (differs := self._differs(description.job.identity)):
            stop = Stop(reason="identity", message=differs)
            store.write({f"{here}/{job_state.STOPPED}": job_state.to_bytes(stop)})
            return self._ended(run, differs)
        attempts = self._attempts(folder, run, number)
        if len(attempts) >= job_state.MOST_ATTEMPTS:
            lost = TransportError(
                f"{len(attempts)} containers died, or were taken away, while they embedded it."
            )
            self._give_up(store, here, number, lost, attempts)
            return "given up"
        attempts.append(
            Attempt(
                container=self._container.id,
                started=self._container.started,
                at=time.time(),
                dollars_per_second=self._container.dollars_per_second,
            )
        )
        store.write({f"{here}/{job_state.attempts_name(number)}": job_state.to_bytes(attempts)})
        (folder / shards.FOLDER).mkdir(exist_ok=True)
        return description

    def _unwanted(self, store: FolderStore, run: str, number: int) -> str:
        """Why nothing is to be done; empty if something is."""
        here = f"{job_state.RUNS}/{run}"
        runs = sorted(store.names(job_state.RUNS))
        if not runs or runs[-1] != run:
            return self._ended(run, "a newer run has taken over")
        if (store.folder / here / job_state.STOPPED).exists():
            return self._ended(run, "the run was stopped")
        if (store.folder / job_state.RECORDS / job_state.record_name(number)).exists():
            return "finished before"
        given_up = (store.folder / here / job_state.failed_name(number)).exists()
        return "given up" if given_up else ""

    def _finish(
        self, folder: Path, run: str, job: Job, filling: Filling, columns: pa.Table
    ) -> None:
        shard = shards.write(folder, filling, job, columns)
        record = Record(
            shard=shard,
            attempts=self._attempts(folder, run, filling.number),
            finished=time.time(),
            gpu=self._container.gpu,
        )
        name = f"{job_state.RECORDS}/{job_state.record_name(filling.number)}"
        FolderStore(folder).write({name: job_state.to_bytes(record)})

    def _failed(self, folder: Path, run: str, number: int, failure: KalmError) -> bool:
        """Record it; whether the shard is given up."""
        store, here = FolderStore(folder), f"{job_state.RUNS}/{run}"
        attempts = self._attempts(folder, run, number)
        attempts[-1] = replace(attempts[-1], error=str(failure))
        hopeless = isinstance(failure, InvalidInputError)
        if hopeless or len(attempts) >= job_state.MOST_ATTEMPTS:
            self._give_up(store, here, number, failure, attempts)
            return True
        store.write({f"{here}/{job_state.attempts_name(number)}": job_state.to_bytes(attempts)})
        return False

    def _attempts(self, folder: Path, run: str, number: int) -> list[Attempt]:
        path = folder / job_state.RUNS / run / job_state.attempts_name(number)
        return job_state.read_attempts(path.read_bytes()) if path.exists() else []

    def _give_up(
        self, store: FolderStore, here: str, number: int, why: KalmError, attempts: list[Attempt]
    ) -> None:
        said = why.message
        failure = job_state.Failure(code=why.code, message=said, attempts=attempts)
        store.write({f"{here}/{job_state.failed_name(number)}": job_state.to_bytes(failure)})

    def _note_canary(self, store: FolderStore, here: str, failure: KalmError) -> bool:
        """Record it; whether it was one too many."""
        said = failure.message
        store.write(
            {f"{here}/canary-{self._container.id}.json": job_state.to_bytes({"said": said})}
        )
        found = [name for name in store.names(here) if name.startswith("canary-")]
        if len(found) < job_state.MOST_CANARIES:
            return False
        message = f"{len(found)} containers could not be trusted, the last one said: {said}"
        stop = Stop(reason="canary", message=message)
        store.write({f"{here}/{job_state.STOPPED}": job_state.to_bytes(stop)})
        return True

    def _differs(self, identity: dict[str, object]) -> str:
        asked = SpaceIdentity.from_dict(identity["space"])  # type: ignore[arg-type]
        served = self._service.identity
        return "" if asked == served else f"the containers have {asked.differences(served)}"

    def _ended(self, run: str, why: str) -> str:
        self._over[run] = why
        return why


def _all_there(folder: Path) -> bool:
    finished = [
        n for n in FolderStore(folder).names(job_state.RECORDS) if job_state.number_in(n) >= 0
    ]
    return len(finished) == len(list((folder / job_state.INPUT).glob("part-*")))


def _write_manifest(folder: Path) -> None:
    """Twice it would be the same."""
    state = Reader(FolderStore(folder)).read()
    if state is not None and state.complete:
        manifest = state.manifest()
        shards.gather_rejected(folder, manifest.shards, keep=True)
        manifest.write(folder)


def _unexpected(error: Exception) -> KalmError:
    return TransportError(f"{type(error).__name__}: {error}.")


def _for_modal(failure: KalmError) -> RuntimeError:
    """Ours would need this package, in this version, to be unpickled."""
    return RuntimeError(f"{failure.code}: {failure}")
