"""Rows to shards: reading, requests and writing overlap; shards end in order, so that what is
finished is always the first part of the job.

On the caller's thread rows are read and vectors put in their places; requests run on the I/O
thread; one more thread writes. At most three shards are open, whatever the input.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.batching import Batch, plan
from kalm_integrations.bulk import shards
from kalm_integrations.bulk.chunks import Block, blocks
from kalm_integrations.bulk.duplicates import Recurring
from kalm_integrations.bulk.manifest import Manifest, Shard
from kalm_integrations.bulk.scan import Scan
from kalm_integrations.bulk.shards import Filling
from kalm_integrations.bulk.sources import Row, Source
from kalm_integrations.client import KalmClient
from kalm_integrations.errors import (
    BadRowsError,
    ConfigurationError,
    InvalidInputError,
    InvalidText,
)
from kalm_integrations.result import EmbeddedBatch
from kalm_integrations.validation import invalid_rows

_MOST_OPEN: Final = 3


class Watcher(Protocol):
    """Who is told how a job goes."""

    def embedded(self, rows: int, tokens: int, rejected: int) -> None:
        """So many rows more have their vectors, or were refused by the model."""
        ...

    def written(self, shard: Shard) -> None:
        """A shard is on the disk. Called from another thread."""
        ...


@dataclass(frozen=True)
class Work:
    """What the pipeline is given."""

    client: KalmClient
    source: Source
    scan: Scan
    manifest: Manifest
    folder: Path
    width: int
    dollars_per_second: float | None
    watcher: Watcher


@dataclass
class _Open(Filling):
    """A shard in memory, with the rows that it is written of."""

    rows: list[Row] = field(default_factory=list)


class Pipeline:
    """One run of a job, from the first shard that is not finished."""

    def __init__(self, work: Work) -> None:
        job = work.manifest.job
        self._work = work
        self._rows_of_a_shard = job.shard_rows
        self._first = work.scan.first
        self._recurring = Recurring(
            work.folder, self._first, job.shard_rows, work.width, job.vector_dtype
        )
        self._refused = shards.rejected_rows(work.folder, work.manifest.shards)
        self._open: deque[_Open] = deque()
        self._writing: deque[Future[None]] = deque()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kalm-shards")
        self._since = time.monotonic()

    def run(self) -> None:
        """Embed and write what is left of the job.

        Raises:
            KalmError: What the service, or a text, failed with. Finished shards are written.
            OSError: A shard could not be written.
        """
        job, client = self._work.manifest.job, self._work.client
        call = client._call_settings(
            "document", "raise" if job.on_error == "fail" else "skip", timeout_per_request=True
        )
        parts = client._dispatcher.run(self._batches(), call, pause_reading=self._busy)
        try:
            try:
                for part in parts:
                    self._take(part)
            finally:
                parts.close()
            self._settle()
            while self._writing:
                self._writing.popleft().result()
        except InvalidInputError as error:
            raise self._named(error) from error
        finally:
            self._writer.shutdown()  # what is filled is written
            self._recurring.close()
        self._recurring.remove()

    # --- reading

    def _batches(self) -> Iterator[Batch]:
        work, client, job = self._work, self._work.client, self._work.manifest.job
        finished = len(work.manifest.shards)
        for block in blocks(
            work.source, work.scan, job.shard_rows, client.config.truncate, finished
        ):
            while self._writing and len(self._open) + len(self._writing) >= _MOST_OPEN:
                self._writing.popleft().result()
            fresh = self._opened(block)
            yield from plan(fresh, client.config.document_template, client.config.request_limits)
            self._settle()

    def _opened(self, block: Block) -> list[tuple[int, str]]:
        """A new shard; the texts that it has first, with their rows."""
        shape, dtype = (len(block.rows), self._work.width), self._work.manifest.job.vector_dtype
        first = self._first[block.start : block.start + len(block.rows)].tolist()
        fresh = [
            (origin, row.text)
            for number, (origin, row) in enumerate(zip(first, block.rows, strict=True), block.start)
            if origin == number
        ]
        filling = _Open(
            block.number,
            block.start,
            block.places,
            np.full(shape, np.nan, dtype=dtype),
            left=len(fresh),
            reasons=dict(block.reasons),
            rows=block.rows,
        )
        self._open.append(filling)
        return fresh

    def _busy(self) -> bool:
        return len(self._open) >= _MOST_OPEN

    # --- vectors into their places

    def _take(self, part: EmbeddedBatch) -> None:
        for bad in part.rejected:
            filling = self._of(bad.index)
            filling.reasons[bad.index - filling.start] = self._refused[bad.index] = bad.reason
            filling.left -= 1
        if len(part):
            filling = self._of(int(part.indices[0]))
            part.write_into(filling.vectors, filling.start)
            filling.left -= len(part)
            filling.tokens += part.usage.tokens
            filling.requests += part.usage.requests
            self._recurring.keep(part.indices, part.packed)
        self._work.watcher.embedded(len(part), part.usage.tokens, len(part.rejected))
        self._settle()

    def _of(self, row: int) -> _Open:
        return self._open[row // self._rows_of_a_shard - self._open[0].number]

    def _settle(self) -> None:
        """Hand filled shards to the writer, in order."""
        while self._writing and self._writing[0].done():
            self._writing.popleft().result()
        while self._open and not self._open[0].left:
            filling = self._open.popleft()
            self._copy(filling)
            self._writing.append(self._writer.submit(self._write, filling))

    def _copy(self, filling: _Open) -> None:
        """To rows whose texts came before."""
        first = self._first[filling.start : filling.start + len(filling.rows)]
        rows = np.arange(len(first))
        for row in np.flatnonzero((first >= 0) & (first != rows + filling.start)).tolist():
            if reason := self._refused.get(int(first[row])):
                filling.reasons[row] = reason
        refused = np.isin(rows, list(filling.reasons))
        copies = (first >= 0) & (first != rows + filling.start) & ~refused
        own = copies & (first >= filling.start)
        filling.vectors[own] = filling.vectors[first[own] - filling.start]
        others = copies & ~own
        if others.any():
            taken: NDArray[Any] = self._recurring.take(first[others])
            if invalid_rows(taken):
                raise ConfigurationError(
                    f"{self._work.folder} lacks the vectors of texts that recur: remove it, and "
                    "begin anew."
                )
            filling.vectors[others] = taken
        if copies.any():
            self._work.watcher.embedded(int(copies.sum()), 0, 0)

    # --- on the writer's thread

    def _write(self, filling: _Open) -> None:
        work = self._work
        self._recurring.sync()
        columns = shards.table_of(filling.rows, work.scan.columns, work.scan.schema)
        shard = shards.write(work.folder, filling, work.manifest.job, columns)
        now = time.monotonic()
        manifest = work.manifest
        manifest.seconds += now - self._since
        if work.dollars_per_second is not None:
            manifest.dollars = (manifest.dollars or 0.0) + (
                (now - self._since) * work.dollars_per_second
            )
        self._since = now
        manifest.shards.append(shard)
        manifest.write(work.folder)
        work.watcher.written(shard)

    def _named(self, error: InvalidInputError) -> InvalidInputError:
        """With places instead of numbers of rows."""
        places: dict[int, str] = {
            filling.start + row: place
            for filling in self._open
            for row, place in enumerate(filling.places)
        }
        named = [
            InvalidText(bad.index, f"({places.get(bad.index, 'of the input')}) {bad.reason}")
            for bad in error.invalid
        ]
        return BadRowsError.of(named) if named else error
