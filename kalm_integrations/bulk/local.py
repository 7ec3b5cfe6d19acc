"""The executor of this machine: reading, requests and writing overlap, and shards end in order.

The caller's thread reads parts and puts vectors into their rows; requests run on the background
event loop; one more thread writes. At most three shards are in memory, whatever the input.
"""

from __future__ import annotations

import queue
import shutil
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from kalm_integrations.batching import Batch
from kalm_integrations.bulk import shards
from kalm_integrations.bulk.embedding import Result, Send, Sender
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
    requests: int = 0
    """Requests whose results are not in the builder yet."""
    writing: bool = False


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
    _running: dict[Future[Any], _OpenShard] = field(default_factory=dict)
    """What requests and the writer are at work at."""
    _done: queue.SimpleQueue[Future[Any]] = field(default_factory=queue.SimpleQueue)
    _write_failed: bool = False

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
            for future, shard in self._running.items():
                if not shard.writing:
                    future.cancel()
            self._writer.shutdown()  # what is complete is written
            for shard in self._open:
                shard.kept.close()
            self._recurring.file.close()
            for client in self._clients:
                client.close()

    def _run(self) -> None:
        for part in self.plan.parts(len(self.manifest.shards)):
            while len(self._open) >= self._most_open():
                self._take_next()
            if self._over_limit(part):
                break
            self._start(part)
            while not self._done.empty():
                self._take_next()
        while self._open:
            self._take_next()
        if len(self.manifest.shards) == self.manifest.job.shards:
            self._recurring.file.close()
            shutil.rmtree(self.folder / KEPT, ignore_errors=True)

    def _take_next(self) -> None:
        """Wait until a request or the writing of a shard is done, and go on with its shard."""
        future = self._done.get()
        shard = self._running.pop(future)
        if shard.writing:
            if future.exception():
                self._keep_sent()
            future.result()
            self._open.remove(shard)
            return
        self._take(shard, future.result())
        shard.requests -= 1
        if not shard.requests:
            shard.builder.check()
        self._write_complete()

    def _keep_sent(self) -> None:
        """Send nothing more, and keep the vectors of what was sent: it is paid."""
        self._sender.stopped = True
        while any(not shard.writing for shard in self._running.values()):
            future = self._done.get()
            shard = self._running.pop(future)
            if not shard.writing and not future.exception():
                self._take(shard, future.result())

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
        ahead = len(part) + sum(
            len(shard.builder.part) for shard in self._open if not shard.writing
        )
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
        self._write_complete()

    def _embed(self, shard: _OpenShard, texts: list[tuple[int, str]]) -> None:
        for batch in self._sender.batches(texts):
            if results := self._known(shard, batch):
                self._take(shard, results)
            else:
                shard.requests += 1
                self._follow(background_loop().submit(self._sender.send(batch)), shard)

    def _follow(self, future: Future[Any], shard: _OpenShard) -> None:
        self._running[future] = shard
        future.add_done_callback(self._done.put)

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

    def _write_complete(self) -> None:
        """Have shards written that have all of their vectors, in order."""
        for shard in [shard for shard in self._open if not shard.writing]:
            while not shard.requests:
                copied, missing = self._recurring.copy(shard.builder)
                if copied:
                    self.progress.embedded(copied, 0, 0)
                if not missing:
                    break
                self._embed(shard, missing)  # their vectors were lost, and are computed again
            if shard.requests:
                return
            self._recurring.keep(shard.builder)
            shard.writing = True
            self._follow(self._writer.submit(self._write, shard), shard)

    def _write(self, shard: _OpenShard) -> None:
        """On the writer's thread."""
        if self._write_failed:
            return  # shards end in order
        self._write_failed = True  # unless it comes to its end
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
        self._write_failed = False

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
