"""Shards: rows with their vectors as Parquet, whole or not there at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kalm_integrations.bulk.columns import Columns
from kalm_integrations.bulk.manifest import Job, Shard, rename
from kalm_integrations.bulk.sources import Row
from kalm_integrations.errors import InvalidResponseError

VECTOR: Final = "vector"
"""Name of the vectors' column: a list of fixed size."""
FOLDER: Final = "shards"
REJECTED: Final = "rejected.parquet"
METADATA: Final = b"kalm"
"""Key of the file's metadata under which the vectors' identity is, as JSON."""
_REJECTED: Final = pa.schema([("row", pa.int64()), ("place", pa.string()), ("reason", pa.string())])
_ROWS_OF_A_GROUP: Final = 1024
"""8 MiB of vectors. To write a group, Arrow takes 8 bytes for each float16 in it."""
_ARROW: Final = {"float16": pa.float16(), "float32": pa.float32()}


@dataclass
class Filling:
    """A shard on its way.

    Attributes:
        number: Counted from 0.
        start: Its first row in the input.
        places: Where its rows are, for people; one for each.
        vectors: One for each row, filled in as they come.
        left: Texts of its own whose vectors, or refusals, are still to come.
        reasons: Why rows have no vector, by their place within the shard.
        tokens: That it took.
        requests: That it took.
    """

    number: int
    start: int
    places: list[str]
    vectors: NDArray[np.floating[Any]] = field(repr=False)
    left: int = 0
    reasons: dict[int, str] = field(default_factory=dict)
    tokens: int = 0
    requests: int = 0


def name_of(number: int) -> str:
    """Of a shard's file."""
    return f"part-{number:06}.parquet"


def table_of(rows: Sequence[Row], columns: Columns, schema: pa.Schema) -> pa.Table:
    """The columns of rows, with their final types."""
    arrays = [
        _array([row.columns.get(name) for row in rows], schema.field(name), columns)
        for name in schema.names
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def write(folder: Path, filled: Filling, job: Job, columns: pa.Table) -> Shard:
    """Write a filled shard, and what of it was rejected.

    Args:
        folder: Of the job.
        filled: The vectors, or the reasons why there are none.
        job: What it is a shard of.
        columns: Of all its rows.

    Raises:
        OSError: The disk is full, for instance. Nothing half-written stays.
        InvalidResponseError: A row has neither a vector nor a reason.
    """
    bad = sorted(filled.reasons)
    good = np.ones(len(filled.places), dtype=np.bool_)
    good[bad] = False
    # A sum is finite where all of its numbers are; it takes no memory of a shard's size.
    finite = np.isfinite(filled.vectors.sum(axis=1, dtype=np.float32))
    if filled.left or not finite[good].all():
        raise InvalidResponseError(f"shard {filled.number} was to be written unfilled.")
    kept = good if job.on_error == "skip" else np.ones_like(good)
    vectors = filled.vectors
    if not kept.all():
        columns, vectors = columns.filter(pa.array(kept)), vectors[kept]
    vectors[~good[kept]] = 0
    width = vectors.shape[1]
    flat = pa.array(vectors.reshape(-1), type=_ARROW[job.vector_dtype])
    vector = (
        pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(~good[kept]))
        if len(columns)
        else pa.array([], type=pa.list_(_ARROW[job.vector_dtype], width))
    )
    table = columns.append_column(VECTOR, vector).replace_schema_metadata(
        {METADATA: json.dumps(job.identity)}
    )
    rejected = pa.table(
        {
            "row": [filled.start + row for row in bad],
            "place": [filled.places[row] for row in bad],
            "reason": [filled.reasons[row] for row in bad],
        },
        schema=_REJECTED,
    )
    name = name_of(filled.number)
    if bad:
        write_table(folder / rejected_name(filled.number), rejected)
    size = write_table(folder / FOLDER / name, table)
    return Shard(
        name=name,
        rows=len(columns),
        rejected=len(bad),
        bytes=size,
        tokens=filled.tokens,
        requests=filled.requests,
    )


def rejected_rows(folder: Path, shards: Sequence[Shard]) -> dict[int, str]:
    """Reasons by input row, of finished shards."""
    found: dict[int, str] = {}
    for number, shard in enumerate(shards):
        if shard.rejected:
            table = pq.read_table(folder / rejected_name(number))
            found |= dict(zip(table["row"].to_pylist(), table["reason"].to_pylist(), strict=True))
    return found


def gather_rejected(folder: Path, shards: Sequence[Shard], *, keep: bool = False) -> None:
    """All rejected rows in one file, at the end of a job; no file where there are none.

    Args:
        folder: Of the job.
        shards: All of them.
        keep: Leave the shards' own files.
    """
    parts = [n for n, shard in enumerate(shards) if shard.rejected]
    if parts:
        tables = [pq.read_table(folder / rejected_name(number)) for number in parts]
        write_table(folder / REJECTED, pa.concat_tables(tables))
        for number in [] if keep else parts:
            (folder / rejected_name(number)).unlink()


def rejected_name(number: int) -> str:
    """Of the file with a shard's rejected rows, until the job is done."""
    return f".rejected-{number:06}.parquet"


def _array(values: list[Any], kind: pa.Field, columns: Columns) -> pa.Array:
    if kind.name in columns.kinds:
        values = columns.values(kind.name, values)
    return pa.array(values, type=kind.type)


def write_table(path: Path, table: pa.Table) -> int:
    """Write a Parquet file that is there whole or not at all; its size."""
    temporary = path.with_name(f".{path.name}.tmp")
    others = [name for name in table.schema.names if name != VECTOR]
    # Numbers that look like noise take longer to compress than to write.
    compression: dict[str, Any] = {
        "compression": {name: "none" if name == VECTOR else "zstd" for name in table.schema.names},
        "use_dictionary": others,
        "write_statistics": others,
    }
    try:
        with temporary.open("wb") as file:
            pq.write_table(table, file, row_group_size=_ROWS_OF_A_GROUP, **compression)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return size
