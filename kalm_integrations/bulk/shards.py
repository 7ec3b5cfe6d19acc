"""Shards: rows with their vectors as Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kalm_integrations.bulk.embedding import Result
from kalm_integrations.bulk.manifest import Job, Shard
from kalm_integrations.bulk.options import int8_column
from kalm_integrations.bulk.parts import Part
from kalm_integrations.bulk.tables import read_table, write_table
from kalm_integrations.errors import (
    BadRowsError,
    ConfigurationError,
    InvalidResponseError,
    InvalidText,
)
from kalm_integrations.prompts import apply
from kalm_integrations.quantize import Int8Calibration
from kalm_integrations.validation import MAX_CHARACTERS

FOLDER: Final = "shards"
REJECTED: Final = "rejected.parquet"
TRUNCATED: Final = "truncated"
METADATA: Final = b"kalm"
"""Key of a shard's metadata that has the vectors' identity, as JSON."""
_REJECTED: Final = pa.schema([("row", pa.int64()), ("place", pa.string()), ("reason", pa.string())])
_ARROW: Final = {"float16": pa.float16(), "float32": pa.float32()}


class ShardBuilder:
    """Collects the vectors of a part of a job, and writes the shard."""

    def __init__(self, part: Part, job: Job, width: int) -> None:
        self.part, self.job = part, job
        self.vectors = np.full((len(part), width), np.nan, dtype=job.vector_dtype)
        self.reasons = dict(part.reasons)
        self.truncated = np.zeros(len(part), dtype=np.bool_)
        self.tokens = self.requests = 0
        for row, (vector, truncated) in part.vectors.items():
            self.vectors[row], self.truncated[row] = vector, truncated

    def own_texts(self) -> list[tuple[int, str]]:
        """The texts to embed, with their rows: those that no earlier part has."""
        fresh = self.part.first >= self.part.start
        rows = np.flatnonzero(fresh & np.isnan(self.vectors[:, 0])).tolist()
        return [(row, self.part.texts[row]) for row in rows]

    def copied_rows(self) -> NDArray[np.int64]:
        """Rows whose text an earlier part has, and that have no vector yet."""
        earlier = (self.part.first >= 0) & (self.part.first < self.part.start)
        rows = np.flatnonzero(earlier & np.isnan(self.vectors[:, 0]))
        return rows[np.isin(rows, list(self.reasons), invert=True)]

    def add(self, results: list[Result]) -> None:
        """Put vectors into their rows."""
        template = self.job.identity.get("document_template", "")
        for result in results:
            batch = result.batch
            batch.write_into(self.vectors)
            self.reasons.update({bad.index: bad.reason for bad in batch.rejected})
            self.tokens += batch.usage.tokens or 0
            self.requests += batch.usage.requests
            if self.job.truncate == "end":
                for row in batch.indices.tolist():
                    text = apply(template, self.part.texts[row])
                    self.truncated[row] = result.truncated or len(text) > MAX_CHARACTERS

    def check(self) -> None:
        """With on_error="fail", refuse rows that the service rejected.

        Raises:
            BadRowsError: They are named by their places.
        """
        bad = sorted(self.reasons.keys() - self.part.reasons.keys())
        if bad and self.job.on_error == "fail":
            raise BadRowsError.of(
                [InvalidText(r, f"({self.part.places[r]}) {self.reasons[r]}") for r in bad]
            )

    def calibrated(self, known: Int8Calibration | None) -> Int8Calibration | None:
        """The calibration of the job's int8 vectors: `known`, or one made from this shard; None
        if the job has none, or this shard no vector."""
        if known is not None or self.job.also is None:
            return known
        good = [row for row in range(len(self.part)) if row not in self.reasons]
        return Int8Calibration.of(self.vectors[good]) if good else None

    def write(self, folder: Path, calibration: Int8Calibration | None = None) -> Shard:
        """Write the shard into the job's folder, and its rejected rows.

        Args:
            folder: The job's.
            calibration: Of the int8 vectors, if the job has any and this shard has vectors.

        Raises:
            OSError: The disk is full, for instance. Nothing half-written stays.
            InvalidResponseError: A row has neither a vector nor a reason.
        """
        part, job, name = self.part, self.job, name_of(self.part.number)
        bad = sorted(self.reasons)
        good = np.ones(len(part), dtype=np.bool_)
        good[bad] = False
        # A sum is finite where all of its numbers are; it takes no memory of a shard's size.
        if not np.isfinite(self.vectors.sum(axis=1, dtype=np.float32))[good].all():
            raise InvalidResponseError(f"shard {part.number} has rows without vectors.")
        kept = good if job.on_error == "skip" else np.ones_like(good)
        columns, vectors = part.columns, self.vectors
        if job.truncate == "end":
            columns = columns.append_column(TRUNCATED, pa.array(self.truncated))
        if not kept.all():
            columns, vectors = columns.filter(pa.array(kept)), vectors[kept]
        vectors[~good[kept]] = 0
        added = {job.vector_column: _lists(vectors, _ARROW[job.vector_dtype], ~good[kept])}
        if job.also is not None:
            empty = np.zeros(vectors.shape, dtype=np.int8)
            codes = empty if calibration is None else calibration.encode(vectors)
            added[int8_column(job.vector_column)] = _lists(codes, pa.int8(), ~good[kept])
        table = _one_chunk(columns)
        for column, values in added.items():
            table = table.append_column(column, values)
        table = table.replace_schema_metadata({METADATA: json.dumps(job.identity)})
        if bad:
            rejected = {
                "row": [part.start + row for row in bad],
                "place": [part.places[row] for row in bad],
                "reason": [self.reasons[row] for row in bad],
            }
            write_table(folder / rejected_name(name), pa.table(rejected, schema=_REJECTED))
        size, digest = write_table(folder / FOLDER / name, table, vectors=[*added])
        return Shard(
            name=name,
            rows=len(columns),
            rejected=len(bad),
            truncated=int(self.truncated.sum()),
            reused=len(part.vectors),
            bytes=size,
            digest=digest,
            tokens=self.tokens,
            requests=self.requests,
        )


def _lists(vectors: NDArray[Any], kind: pa.DataType, null: NDArray[np.bool_]) -> pa.Array:
    """Vectors as a column of lists of a fixed size, with nulls where `null` is true."""
    width = vectors.shape[1]
    if not len(vectors):
        return pa.array([], type=pa.list_(kind, width))
    flat = pa.array(vectors.reshape(-1), type=kind)
    return pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(null))


def _one_chunk(table: pa.Table) -> pa.Table:
    """However the rows came, the file is the same."""
    try:
        return table.combine_chunks()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return table  # dictionaries within lists are not merged


def name_of(number: int) -> str:
    """Of a shard's file."""
    return f"part-{number:06}.parquet"


def rejected_name(shard: str) -> str:
    """Of the file with a shard's rejected rows, until the job is complete."""
    return f".{shard.replace('part', 'rejected')}"


def rejected_rows(folder: Path, shards: list[Shard]) -> dict[int, str]:
    """Reasons by input row, of finished shards."""
    found: dict[int, str] = {}
    for shard in shards:
        if shard.rejected:
            table = _read_rejected(folder, shard)
            found |= dict(zip(table["row"].to_pylist(), table["reason"].to_pylist(), strict=True))
    return found


def gather_rejected(folder: Path, shards: list[Shard], *, keep: bool = False) -> None:
    """Put all rejected rows into one file, at the end of a job; no file where there are none. The
    shards' own files are removed, unless they are to be kept."""
    some = [shard for shard in shards if shard.rejected]
    if some:
        tables = [_read_rejected(folder, shard) for shard in some]
        write_table(folder / REJECTED, pa.concat_tables(tables))
        for shard in [] if keep else some:
            (folder / rejected_name(shard.name)).unlink()


def _read_rejected(folder: Path, shard: Shard) -> pa.Table:
    path = folder / rejected_name(shard.name)
    try:
        table = read_table(path)
        if table.schema.equals(_REJECTED) and len(table) == shard.rejected:
            return table
        why = "it is not this job's"
    except (OSError, pa.ArrowException) as error:
        why = str(error)
    raise ConfigurationError(
        f"{path} cannot be read: {why}. Restore it from a copy, or choose another --output."
    )
