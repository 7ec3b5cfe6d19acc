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
from typing import Any, Final, Protocol, TypeVar

from kalm_integrations.bulk import shards
from kalm_integrations.bulk.embedding import Send, Sender, embed_texts
from kalm_integrations.bulk.manifest import Job
from kalm_integrations.bulk.on_modal import state as job_state
from kalm_integrations.bulk.on_modal import worker_pool
from kalm_integrations.bulk.on_modal.state import (
    Attempt,
    Attempts,
    Description,
    Failure,
    FolderStore,
    Reader,
    Run,
    ShardRecord,
    Stop,
    file_of,
)
from kalm_integrations.bulk.shards import Part, ShardBuilder
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import InvalidInputError, KalmError, TransportError
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.session import CallSettings, Session
from kalm_integrations.transports.in_process import InProcessTransport
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


_FOREVER: Final = 86_400.0
"""Seconds for a request: how long a shard may take is for Modal's own limit."""
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
        self._readers: dict[Path, Reader] = {}
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
                await self._embed_claimed(folder, run, claimed, number)
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

    async def _embed_claimed(
        self, folder: Path, run: str, description: Description, number: int
    ) -> None:
        job = description.job
        path = folder / job_state.INPUT / shards.name_of(number)
        part = await self._with_files(
            lambda: Part.read(path, number, job, description.digests[number]), commit=False
        )
        builder = await embed_part(self._service, job, part)
        await self._with_files(lambda: self._finish(folder, run, builder))

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
        description = Description.from_bytes(store.read(job_state.JOB), job_state.JOB)
        if self._service.failure is None and (differs := self._differs(description.job.identity)):
            self._stop(store, here, "identity", differs)
            return self._ended(run, differs)
        if limit := self._limit_reached(folder, run):
            self._stop(store, here, "limit", limit)
            return self._ended(run, limit)
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
        self._note_attempts(store, here, number, attempts)
        (folder / shards.FOLDER).mkdir(exist_ok=True)
        return description

    def _limit_reached(self, folder: Path, run: str) -> str:
        """Which limit the job has reached; empty if none."""
        path = folder / job_state.RUNS / run / job_state.RUN
        limits = Run.from_bytes(path.read_bytes(), job_state.RUN)
        if limits.max_dollars is None and limits.max_hours is None:
            return ""
        state = self._readers.setdefault(folder, Reader(FolderStore(folder))).read()
        if state is None:
            return ""
        if limits.max_dollars is not None and state.dollars >= limits.max_dollars:
            return f"the job has cost ${state.dollars:,.2f}, and --max-dollars is reached."
        if limits.max_hours is not None and state.seconds >= 3600 * limits.max_hours:
            return f"containers took {state.seconds / 3600:,.2f} h, and --max-hours is reached."
        return ""

    def _stop(self, store: FolderStore, here: str, reason: str, message: str) -> None:
        stop = Stop(reason=reason, message=message)
        store.write({f"{here}/{job_state.STOPPED}": stop.to_bytes()})

    def _note_attempts(
        self, store: FolderStore, here: str, number: int, attempts: list[Attempt]
    ) -> None:
        content = Attempts(attempts=attempts).to_bytes()
        store.write({f"{here}/{file_of(number, 'attempts')}": content})

    def _unwanted(self, store: FolderStore, run: str, number: int) -> str:
        """Why nothing is to be done; empty if something is."""
        here = f"{job_state.RUNS}/{run}"
        runs = sorted(store.names(job_state.RUNS))
        if not runs or runs[-1] != run:
            return self._ended(run, "a newer run has taken over")
        if (store.folder / here / job_state.STOPPED).exists():
            return self._ended(run, "the run was stopped")
        if (store.folder / job_state.RECORDS / file_of(number)).exists():
            return "finished before"
        given_up = (store.folder / here / file_of(number, "failed")).exists()
        return "given up" if given_up else ""

    def _finish(self, folder: Path, run: str, builder: ShardBuilder) -> None:
        record = ShardRecord(
            shard=builder.write(folder),
            attempts=self._attempts(folder, run, builder.part.number),
            finished=time.time(),
            gpu=self._container.gpu,
        )
        name = f"{job_state.RECORDS}/{file_of(builder.part.number)}"
        FolderStore(folder).write({name: record.to_bytes()})

    def _failed(self, folder: Path, run: str, number: int, failure: KalmError) -> bool:
        """Record it; whether the shard is given up."""
        store, here = FolderStore(folder), f"{job_state.RUNS}/{run}"
        attempts = self._attempts(folder, run, number)
        attempts[-1] = attempts[-1].model_copy(update={"error": str(failure)})
        hopeless = isinstance(failure, InvalidInputError)
        if hopeless or len(attempts) >= job_state.MOST_ATTEMPTS:
            self._give_up(store, here, number, failure, attempts)
            return True
        self._note_attempts(store, here, number, attempts)
        return False

    def _attempts(self, folder: Path, run: str, number: int) -> list[Attempt]:
        path = folder / job_state.RUNS / run / file_of(number, "attempts")
        return Attempts.from_bytes(path.read_bytes(), path.name).attempts if path.exists() else []

    def _give_up(
        self, store: FolderStore, here: str, number: int, why: KalmError, attempts: list[Attempt]
    ) -> None:
        failure = Failure(code=why.code, message=why.message, attempts=attempts)
        store.write({f"{here}/{file_of(number, 'failed')}": failure.to_bytes()})

    def _note_canary(self, store: FolderStore, here: str, failure: KalmError) -> bool:
        """Record it; whether it was one too many."""
        note = Stop(reason="canary", message=failure.message).to_bytes()
        store.write({f"{here}/canary-{self._container.id}.json": note})
        found = [name for name in store.names(here) if name.startswith("canary-")]
        if len(found) < job_state.MOST_CANARIES:
            return False
        message = f"{len(found)} containers could not be trusted, the last one: {failure.message}"
        self._stop(store, here, "canary", message)
        return True

    def _differs(self, identity: dict[str, object]) -> str:
        expected = SpaceIdentity.from_dict(identity["space"])  # type: ignore[arg-type]
        served = self._service.identity
        return "" if expected == served else f"the containers have {expected.differences(served)}"

    def _ended(self, run: str, why: str) -> str:
        self._over[run] = why
        return why


async def embed_part(service: EmbeddingService, job: Job, part: Part) -> ShardBuilder:
    """Embed a part with the service in this process, as a local job does with any service.

    Raises:
        InvalidInputError: With on_error="fail", texts that cannot be embedded, by their places.
        KalmError: The engine failed, or gave what is no vector of the job's.
    """
    identity = job.vector_identity
    builder = ShardBuilder(part, job, identity.dimensions or service.dimensions[0])
    transport, cut = InProcessTransport(service), job.truncate == "end"

    def sending(truncate: str) -> tuple[ClientConfig, Send]:
        fixed: dict[str, Any] = {
            "model": identity.space.model,
            "expected_identity": identity.space,
            "dimensions": identity.dimensions or None,
            "vector_dtype": job.vector_dtype,
            "truncate": truncate,
        }
        config = ClientConfig(backend="modal", timeout=_FOREVER, max_retries=2, **fixed)
        session = Session(config, transport)
        call = CallSettings(role="document", timeout=_FOREVER, skip_invalid=True)
        return config, lambda batch: session.send(batch, call)

    config, send = sending(job.truncate)
    sender = Sender(
        sending("error")[1] if cut else send,
        send_cut=send if cut else None,
        wait=send,
        template=identity.document_template,
        limits=config.request_limits,
        concurrency=config.max_concurrency,
    )
    await embed_texts(sender, builder.own_texts(), builder.add)
    builder.check()
    return builder


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
