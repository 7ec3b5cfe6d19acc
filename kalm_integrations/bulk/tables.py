"""Parquet files that are there whole or not at all, with a digest of their bytes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from kalm_integrations.bulk.manifest import file_digest, written_whole
from kalm_integrations.errors import ConfigurationError

_GROUP_ROWS: Final = 512
"""4 MiB of vectors. To write a row group, Arrow takes 8 bytes for each float16 in it."""


def python_texts(column: pa.ChunkedArray) -> list[Any]:
    """A text column as Python strings."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return list(column.to_pylist())


def read_table(path: Path, digest: str = "", columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file, from the very bytes whose digest was compared.

    Raises:
        ConfigurationError: It was changed or damaged since it was written.
    """
    content = path.read_bytes()
    if digest and xxhash.xxh3_128_hexdigest(content) != digest:
        raise ConfigurationError(f"{path} is damaged, or was changed since it was written.")
    with pq.ParquetFile(pa.BufferReader(content)) as file:
        return file.read(columns)


def write_table(path: Path, table: pa.Table, vectors: Collection[str] = ()) -> tuple[int, str]:
    """Write a Parquet file that is there whole or not at all; its size and digest.

    Columns that are `vectors` are not compressed.
    """
    others = [name for name in table.column_names if name not in vectors]
    with written_whole(path) as file:
        writer = pq.ParquetWriter(
            file,
            table.schema,
            # Numbers that look like noise take longer to compress than to write.
            compression={**dict.fromkeys(vectors, "none"), **dict.fromkeys(others, "zstd")},
            use_dictionary=others,
            write_statistics=others,
        )
        with writer:
            for start in range(0, max(1, len(table)), _GROUP_ROWS):
                group = table.slice(start, _GROUP_ROWS)
                if any("view" in str(kind) for kind in table.schema.types):
                    group = _copied(group)
                writer.write_table(group, row_group_size=_GROUP_ROWS)
    return path.stat().st_size, file_digest(path)


def _copied(table: pa.Table) -> pa.Table:
    """A slice as a table of its own: Arrow cannot write slices of some types, views in structs."""
    columns = [
        pa.concat_arrays(table[name].chunks or [table[name].combine_chunks()])
        for name in table.column_names
    ]
    return pa.table(columns, schema=table.schema)
