"""The output of a finished job, read back: for numpy, and for the stores of LangChain and
LlamaIndex."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kalm_integrations.bulk.ids import id_strings
from kalm_integrations.bulk.manifest import Manifest, Shard
from kalm_integrations.bulk.options import int8_column
from kalm_integrations.bulk.shards import FOLDER, METADATA
from kalm_integrations.bulk.tables import python_texts, read_table
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.identity import VectorIdentity


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a job. Rows without a vector (of on_error="null") are left out.

    Attributes:
        texts: What was embedded.
        ids: The id column as strings; None without one.
        vectors: Shape (rows, dimensions), float32, each of unit length.
        int8: The same in int8, if the job has it; the manifest has its `calibration`.
        columns: All other columns, as a table.
    """

    texts: list[str]
    ids: list[str] | None
    vectors: NDArray[np.float32] = field(repr=False)
    columns: pa.Table = field(repr=False)
    int8: NDArray[np.int8] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.texts)

    def metadata(self) -> list[dict[str, Any]]:
        """The other columns, one dictionary a row. A column with values that Python cannot hold,
        such as dates after the year 9999, comes as text."""
        columns = {name: _python_values(self.columns[name]) for name in self.columns.column_names}
        return [{name: values[row] for name, values in columns.items()} for row in range(len(self))]


def read(folder: str | Path, *, expected: VectorIdentity | None = None) -> Iterator[Rows]:
    """The rows of a finished job, shard by shard, in the order of the input.

    Args:
        folder: A job's `--output`.
        expected: `client.vector_identity` of whoever will search: refuses vectors of another
            space before they are in an index.

    Raises:
        ConfigurationError: There is no job, or it is not finished, or a shard is damaged.
        IdentityMismatchError: The vectors are not the expected ones.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if manifest is None:
        raise ConfigurationError(f"{folder} has no manifest.json: it is no job's output.")
    if not manifest.complete:
        raise ConfigurationError(f"the job in {folder} is not finished: run it again.")
    if expected is not None:
        expected.check(manifest.job.vector_identity)
    return (_rows(folder, manifest, shard) for shard in manifest.shards)


def _rows(folder: Path, manifest: Manifest, shard: Shard) -> Rows:
    job, path = manifest.job, folder / FOLDER / shard.name
    try:
        table = read_table(path, shard.digest)
        written = json.loads(table.schema.metadata[METADATA])
        vector = table.column(job.vector_column).combine_chunks()
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror or error}.") from error
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}.") from error
    if written != job.identity or len(table) != shard.rows:
        raise ConfigurationError(f"{shard.name} in {folder} is not this job's.")
    if vector.null_count:
        table = table.filter(vector.is_valid())
        vector = table.column(job.vector_column).combine_chunks()
    ours = [job.vector_column, job.text_column]
    codes = None
    if job.also is not None:
        ours.append(int8_column(job.vector_column))
        codes = _matrix(table[ours[-1]].combine_chunks())
    ids = None if job.id_column is None else id_strings(table[job.id_column])
    return Rows(
        texts=python_texts(table[job.text_column]),
        ids=None if ids is None else [str(value) for value in ids],
        vectors=_matrix(vector).astype(np.float32),
        columns=table.drop_columns(ours),
        int8=codes,
    )


def _matrix(column: pa.FixedSizeListArray) -> NDArray[Any]:
    flat: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, column.type.list_size)


def _python_values(column: pa.ChunkedArray) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, ArithmeticError):
        pass
    try:
        return list(column.cast(pa.string()).to_pylist())
    except pa.ArrowException:
        return [str(value) for chunk in column.chunks for value in chunk]
