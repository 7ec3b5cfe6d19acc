"""What a job has made, read back: for numpy, and for the stores of LangChain and LlamaIndex."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kalm_integrations.bulk.manifest import Manifest
from kalm_integrations.bulk.shards import FOLDER, METADATA, VECTOR
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.identity import VectorIdentity


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a job. Rows without a vector (of on_error="null") are left out.

    Attributes:
        texts: What was embedded.
        ids: The id column as strings; None without one.
        vectors: Shape (rows, dimensions), float32, each of unit length.
        columns: All other columns, as a table.
    """

    texts: list[str]
    ids: list[str] | None
    vectors: NDArray[np.float32] = field(repr=False)
    columns: pa.Table = field(repr=False)

    def __len__(self) -> int:
        return len(self.texts)

    def metadata(self) -> list[dict[str, Any]]:
        """The other columns, one dictionary a row."""
        return list(self.columns.to_pylist())


def read(folder: str | Path, *, expected: VectorIdentity | None = None) -> Iterator[Rows]:
    """The rows of a finished job, shard by shard, in the order of the input.

    Args:
        folder: A job's `--output`.
        expected: `client.vector_identity` of whoever will search: refuses vectors of another
            space before they are in an index.

    Raises:
        ConfigurationError: There is no job, or it is not finished.
        IdentityMismatchError: The vectors are not the expected ones.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if manifest is None:
        raise ConfigurationError(f"{folder} has no manifest.json: it is no job's output.")
    if not manifest.complete:
        raise ConfigurationError(f"the job in {folder} is not finished: run it again.")
    if expected is not None:
        expected.check(VectorIdentity.from_dict(manifest.job.identity))
    return _rows(folder, manifest)


def _rows(folder: Path, manifest: Manifest) -> Iterator[Rows]:
    job = manifest.job
    for shard in manifest.shards:
        table = pq.read_table(folder / FOLDER / shard.name)
        written = json.loads(table.schema.metadata[METADATA])
        if written != job.identity or len(table) != shard.rows:
            raise ConfigurationError(f"{shard.name} in {folder} is not this job's.")
        column = table.column(VECTOR).combine_chunks()
        if column.null_count:
            table = table.filter(column.is_valid())
            column = table.column(VECTOR).combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False)
        width = column.type.list_size
        ids = None if job.id_column is None else list(map(str, table[job.id_column].to_pylist()))
        yield Rows(
            texts=table[job.text_column].to_pylist(),
            ids=ids,
            vectors=flat.reshape(-1, width).astype(np.float32),
            columns=table.drop_columns([VECTOR, job.text_column]),
        )
