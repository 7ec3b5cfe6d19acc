"""The executor of this machine: reading, requests and writing overlap, and shards end in order.

The caller's thread reads parts and puts vectors into their rows; requests run on the background
event loop; one more thread writes. At most three shards are in memory, whatever the input.
"""

from __future__ import annotations

import asyncio
import queue
import shutil
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from kalm_integrations.batching import Batch
from kalm_integrations.bulk import shards
from kalm_integrations.bulk.embedding import Result, Send, Sender, embed_texts
from kalm_integrations.bulk.manifest import Manifest
from kalm_integrations.bulk.parts import Part
from kalm_integrations.bulk.plan import Plan
from kalm_integrations.bulk.shards import ShardBuilder
from kalm_integrations.bulk.vectors import KEPT, EarlierVectors, RecurringTexts, VectorFile
from kalm_integrations.client import KalmClient
from kalm_integrations.event_loop import background_loop
from kalm_integrations.result import EmbeddedBatch, Usage
from kalm_integrations.session import CallSettings

_MOST_OPEN: Final = 3
_RETRIES: Final = 100  # of one request, more than an hour of them: its `timeout` comes before
_RECURRING: Final = "recurring"


class Progress:
    """Who is told how a job goes; this one shows nothing."""

    def scanned(self, rows: int) -> None:
        """So many rows more were read, before anything is sent."""

    def begun(self, plan: Plan, finished: int, manifest: Manifest) -> None:
        """The work begins; so many rows were finished before."""

    def embedded(self, rows: int, tokens: int, rejected: int) -> None:
        """So many rows more have their vectors, or were rejected."""


@dataclass(eq=False)
class _OpenShard:
    builder: ShardBuilder
    kept: VectorFile
    work: Future[None] | None = None
    embedded: bool = False


@dataclass
class LocalExecutor:
    """One run of a job, from the first shard that is not finished; `manifest` grows with each."""

    client: KalmClient
    plan: Plan
    manifest: Manifest
    folder: Path
    width: int
    earlier: EarlierVectors | None
    progress: Progress
    _open: deque[_OpenShard] = field(default_factory=deque)
    _writing: int = 0
    _failure: BaseException | None = None
    _write_failed: bool = False
    _events: queue.SimpleQueue[Callable[[], None]] = field(default_factory=queue.SimpleQueue)

    def run(self) -> None:
        """Embed and write what is left of the job, as far as its limits allow.

        Raises:
            KalmError: The service failed, or a text cannot be embedded. Finished shards stay.
            OSError: A shard could not be written.
        """
        refused = shards.rejected_rows(self.folder, self.manifest.shards)
        self._recurring = RecurringTexts(self.plan, self._vector_file(_RECURRING), refused)
        self._clients: list[KalmClient] = []
        self._sender = self._new_sender()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kalm-shards")
        self._since = time.monotonic()
        try:
            self._run()
        finally:
            for shard in self._open:
                if shard.work is not None:
                    shard.work.cancel()
            self._writer.shutdown()  # what is complete is written
            for shard in self._open:
                shard.kept.close()
            self._recurring.file.close()
            for client in self._clients:
                client.close()

    def _run(self) -> None:
        for part in self.plan.parts(len(self.manifest.shards)):
            while self._failure is None and len(self._open) + self._writing >= self._most_open():
                self._events.get()()
            if self._failure is not None or self._over_limit(part):
                break
            self._start(part)
            while not self._events.empty():
                self._events.get()()
        while self._failure is None and (self._open or self._writing):
            self._events.get()()
        if self._failure is not None:  # what was sent is paid: it is kept
            while any(shard.work is not None for shard in self._open):
                self._events.get()()
            raise self._failure
        if len(self.manifest.shards) == self.manifest.job.shards:
            self._recurring.file.close()
            shutil.rmtree(self.folder / KEPT, ignore_errors=True)

    # --- limits

    def _most_open(self) -> int:
        """What a shard takes is known when the first is finished."""
        options = self.plan.options
        limited = options.max_dollars is not None or options.max_hours is not None
        return 1 if limited and not self.manifest.shards else _MOST_OPEN

    def _over_limit(self, part: Part) -> bool:
        """Whether this part, with what is under way, would end over a limit."""
        options, manifest = self.plan.options, self.manifest
        done = sum(manifest.job.shard_rows for _ in manifest.shards) or part.start
        ahead = len(part) + sum(len(shard.builder.part) for shard in self._open)
        seconds = manifest.seconds * (1 + ahead / done) if done else 0.0
        rate = options.dollars_per_second or 0.0
        return any(
            most is not None and (seconds * each > most or manifest.seconds * each >= most)
            for most, each in ((options.max_dollars, rate), (options.max_hours, 1 / 3600))
        )

    # --- one shard

    def _start(self, part: Part) -> None:
        if self.earlier is not None:
            self.earlier.give(part)
        builder = ShardBuilder(part, self.manifest.job, self.width)
        shard = _OpenShard(builder, self._vector_file(f"part-{part.number:06}"))
        self._open.append(shard)
        if part.vectors:
            self.progress.embedded(len(part.vectors), 0, 0)
        self._embed(shard, builder.own_texts())

    def _embed(self, shard: _OpenShard, texts: list[tuple[int, str]]) -> None:
        work = embed_texts(
            self._sender,
            texts,
            partial(self._hand_over, shard),
            partial(self._known, shard),
        )
        shard.work = background_loop().submit(work)
        shard.work.add_done_callback(
            lambda done: self._events.put(partial(self._embedded, shard, done))
        )

    def _hand_over(self, shard: _OpenShard, results: list[Result]) -> Awaitable[object]:
        """On the event loop: have the caller's thread take results; done when it has."""
        loop, taken = asyncio.get_running_loop(), asyncio.Event()

        def take() -> None:
            self._take(shard, results)
            loop.call_soon_threadsafe(taken.set)

        self._events.put(take)
        return taken.wait()

    def _take(self, shard: _OpenShard, results: list[Result]) -> None:
        builder = shard.builder
        builder.add(results)
        for result in results:
            batch = result.batch
            if not batch.usage.requests and len(batch):  # it was kept by an earlier run
                self.progress.embedded(len(batch), 0, 0)
                continue
            self.client._dispatcher.report_usage(batch.usage)
            rows = batch.indices
            cut = builder.truncated[rows]
            shard.kept.put(rows, builder.part.keys[rows], batch.packed, cut)
            self.progress.embedded(len(batch), batch.usage.tokens or 0, len(batch.rejected))

    def _known(self, shard: _OpenShard, batch: Batch) -> list[Result] | None:
        """A batch that an earlier run has kept whole."""
        if shard.kept.is_empty:
            return None
        rows = np.array([row for places in batch.positions for row in places], dtype=np.int64)
        found, vectors, cut = shard.kept.get(rows, shard.builder.part.keys[rows])
        if not found.all():
            return None
        parts = [(rows[cut == flag], vectors[cut == flag], flag) for flag in (False, True)]
        return [Result(EmbeddedBatch(r, v, Usage()), flag) for r, v, flag in parts if len(r)]

    def _embedded(self, shard: _OpenShard, done: Future[None]) -> None:
        shard.work = None  # it refers to the shard, whose memory a cycle would keep
        if self._failure is not None:
            return
        done.result()
        shard.builder.check()
        shard.embedded = True
        while self._open and self._open[0].embedded:
            head = self._open[0]
            copied, missing = self._recurring.copy(head.builder)
            if copied:
                self.progress.embedded(copied, 0, 0)
            if missing:  # their vectors were lost, and are computed again
                head.embedded = False
                self._embed(head, missing)
                return
            self._open.popleft()
            self._recurring.keep(head.builder)
            self._writing += 1
            self._writer.submit(self._write, head)

    def _write(self, shard: _OpenShard) -> None:
        """On the writer's thread."""
        if self._write_failed:  # shards end in order
            shard.kept.close()
            return
        try:
            self._recurring.file.sync()
            manifest, price = self.manifest, self.plan.options.dollars_per_second
            manifest.calibration = shard.builder.calibrated(manifest.calibration)
            finished = shard.builder.write(self.folder, manifest.calibration)
            now = time.monotonic()
            manifest.seconds += now - self._since
            if price is not None:
                manifest.dollars = (manifest.dollars or 0.0) + (now - self._since) * price
            self._since = now
            manifest.shards.append(finished)
            manifest.count()
            manifest.write(self.folder)
            shard.kept.remove()
        except BaseException as error:
            self._write_failed = True
            shard.kept.close()
            self._events.put(partial(self._failed, error))
            raise
        self._events.put(self._written)

    def _failed(self, error: BaseException) -> None:
        self._failure, self._sender.stopped = error, True

    def _written(self) -> None:
        self._writing -= 1

    # --- where vectors come from

    def _vector_file(self, name: str) -> VectorFile:
        return VectorFile(self.folder / KEPT / name, self.width, self.manifest.job.vector_dtype)

    def _new_sender(self) -> Sender:
        config = self.client.config
        # A job of hours does not end because a service restarts: it waits for `timeout`.
        patience = {} if "max_retries" in config.model_fields_set else {"max_retries": _RETRIES}
        return Sender(config, config.document_template, self._sending, **patience)

    def _sending(self, **changed: Any) -> Send:
        client = self.client
        if changed:
            client = client.with_options(**changed)
            self._clients.append(client)
        call = CallSettings(role="document", timeout=client.config.timeout, skip_invalid=True)
        return lambda batch: client._dispatcher.send(batch, call)
