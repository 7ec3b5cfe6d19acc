"""Parts and shards: rows on their way in, and rows with their vectors as Parquet."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from kalm_integrations.bulk.embedding import Result
from kalm_integrations.bulk.manifest import Job, Shard, rename
from kalm_integrations.errors import (
    BadRowsError,
    ConfigurationError,
    InvalidResponseError,
    InvalidText,
)
from kalm_integrations.prompts import apply
from kalm_integrations.validation import MAX_CHARACTERS

FOLDER: Final = "shards"
REJECTED: Final = "rejected.parquet"
TRUNCATED: Final = "truncated"
METADATA: Final = b"kalm"
"""Key of a shard's metadata that has the vectors' identity, as JSON."""
_REJECTED: Final = pa.schema([("row", pa.int64()), ("place", pa.string()), ("reason", pa.string())])
_GROUP_ROWS: Final = 1024
"""8 MiB of vectors. To write a row group, Arrow takes 8 bytes for each float16 in it."""
_ARROW: Final = {"float16": pa.float16(), "float32": pa.float32()}
_PLACE, _REASON, _REUSED = "kalm:place", "kalm:reason", "kalm:reused"


@dataclass(frozen=True, slots=True)
class Part:
    """The rows that one shard is made from.

    Attributes:
        number: Of the part and its shard, counted from 0.
        start: Its first row in the input.
        columns: The columns that the shard will have beside vectors.
        places: Where the rows are in the input, for people.
        texts: The text column, whatever its values are.
        reasons: Why rows cannot be embedded, by row of the part.
        first: For each row, the row of the input that has its text first; -1 of a bad row.
        keys: Digest of each row's text; none in a container.
        tokens: Estimated tokens of all rows.
        vectors: Vectors of another job that are used again, by row of the part; and whether
            their texts were cut.
    """

    number: int
    start: int
    columns: pa.Table = field(repr=False)
    places: list[str] = field(repr=False)
    texts: list[Any] = field(repr=False)
    reasons: dict[int, str]
    first: NDArray[np.int64] = field(repr=False)
    keys: NDArray[np.uint64] = field(repr=False)
    tokens: int = 0
    vectors: dict[int, tuple[NDArray[Any], bool]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.places)

    def write(self, path: Path) -> tuple[int, str]:
        """Write it as a file that `read` reads; its size and digest."""
        reasons = [self.reasons.get(row) for row in range(len(self))]
        table = self.columns.append_column(_PLACE, pa.array(self.places, pa.string()))
        table = table.append_column(_REASON, pa.array(reasons, pa.string()))
        if self.vectors:
            known = [self.vectors.get(row) for row in range(len(self))]
            raw = [None if v is None else bytes([v[1]]) + v[0].tobytes() for v in known]
            table = table.append_column(_REUSED, pa.array(raw, pa.large_binary()))
        return write_table(path, table, vector=_REUSED if self.vectors else None)

    @classmethod
    def read(cls, path: Path, number: int, job: Job, digest: str) -> Part:
        """Read what `write` has written.

        Raises:
            ConfigurationError: The file is damaged, or not a part of this job.
        """
        try:
            table = read_table(path, digest)
            places, given = table[_PLACE].to_pylist(), table[_REASON].to_pylist()
            reasons = {row: reason for row, reason in enumerate(given) if reason is not None}
            texts, reused = python_texts(table[job.text_column]), {}
            if _REUSED in table.column_names:
                raw = enumerate(table[_REUSED].to_pylist())
                dtype = job.vector_dtype
                reused = {n: (np.frombuffer(v[1:], dtype), bool(v[0])) for n, v in raw if v}
        except (KeyError, OSError, pa.ArrowException) as error:
            raise ConfigurationError(f"{path.name} is not an input part ({error}).") from error
        start = number * job.shard_rows
        first = np.arange(start, start + len(places))
        first[list(reasons)] = -1
        return cls(
            number=number,
            start=start,
            columns=table.select([n for n in table.column_names if not n.startswith("kalm:")]),
            places=places,
            texts=texts,
            reasons=reasons,
            first=first,
            keys=np.empty((0, 2), dtype=np.uint64),
            vectors=reused,
        )


class ShardBuilder:
    """Collects the vectors of a part, and writes the shard.

    Args:
        part: The rows.
        job: What the shard belongs to.
        width: Dimensions of the vectors.
    """

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
        open_rows = np.flatnonzero(earlier & np.isnan(self.vectors[:, 0]))
        return np.array([row for row in open_rows if row not in self.reasons], dtype=np.int64)

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

    def write(self, folder: Path) -> Shard:
        """Write the shard, and its rejected rows.

        Args:
            folder: Of the job.

        Raises:
            OSError: The disk is full, for instance. Nothing half-written stays.
            InvalidResponseError: A row has neither a vector nor a reason.
        """
        part, job = self.part, self.job
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
        kind, width = _ARROW[job.vector_dtype], vectors.shape[1]
        vector = pa.array([], type=pa.list_(kind, width))
        if len(columns):
            flat = pa.array(vectors.reshape(-1), type=kind)
            vector = pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(~good[kept]))
        table = _one_chunk(columns).append_column(job.vector_column, vector)
        table = table.replace_schema_metadata({METADATA: json.dumps(job.identity)})
        if bad:
            rejected = {
                "row": [part.start + row for row in bad],
                "place": [part.places[row] for row in bad],
                "reason": [self.reasons[row] for row in bad],
            }
            write_table(folder / rejected_name(part.number), pa.table(rejected, schema=_REJECTED))
        name = name_of(part.number)
        size, digest = write_table(folder / FOLDER / name, table, vector=job.vector_column)
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


def python_texts(column: pa.ChunkedArray) -> list[Any]:
    """A text column as Python strings."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return list(column.to_pylist())


def _one_chunk(table: pa.Table) -> pa.Table:
    """However the rows came, the file is the same."""
    try:
        return table.combine_chunks()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return table  # dictionaries within lists are not merged


def name_of(number: int) -> str:
    """Of a shard's file."""
    return f"part-{number:06}.parquet"


def rejected_name(number: int) -> str:
    """Of the file with a shard's rejected rows, until the job is complete."""
    return f".rejected-{number:06}.parquet"


def rejected_rows(folder: Path, shards: list[Shard]) -> dict[int, str]:
    """Reasons by input row, of finished shards."""
    found: dict[int, str] = {}
    for shard in shards:
        if shard.rejected:
            table = _read_rejected(folder, shard)
            found |= dict(zip(table["row"].to_pylist(), table["reason"].to_pylist(), strict=True))
    return found


def gather_rejected(folder: Path, shards: list[Shard], *, keep: bool = False) -> None:
    """Put all rejected rows into one file, at the end of a job; no file where there are none.

    Args:
        folder: Of the job.
        shards: All of them.
        keep: Keep the shards' own files.
    """
    some = [shard for shard in shards if shard.rejected]
    if some:
        tables = [_read_rejected(folder, shard) for shard in some]
        write_table(folder / REJECTED, pa.concat_tables(tables))
        for shard in [] if keep else some:
            (folder / rejected_name(number_of(shard))).unlink()


def number_of(shard: Shard) -> int:
    """The number in a shard's name."""
    return int(shard.name[len("part-") : -len(".parquet")])


def _read_rejected(folder: Path, shard: Shard) -> pa.Table:
    path = folder / rejected_name(number_of(shard))
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


def write_table(path: Path, table: pa.Table, vector: str | None = None) -> tuple[int, str]:
    """Write a Parquet file that is there whole or not at all; its size and digest."""
    temporary = path.with_name(f".{path.name}.tmp")
    others = [name for name in table.column_names if name != vector]
    try:
        with temporary.open("wb") as file:
            hashed = _Hashed(file)
            writer = pq.ParquetWriter(
                hashed,
                table.schema,
                # Numbers that look like noise take longer to compress than to write.
                compression={str(vector): "none", **dict.fromkeys(others, "zstd")},
                use_dictionary=others,
                write_statistics=others,
            )
            with writer:
                for start in range(0, max(1, len(table)), _GROUP_ROWS):
                    group = table.slice(start, _GROUP_ROWS)
                    if any("view" in str(kind) for kind in table.schema.types):
                        group = _copied(group)
                    writer.write_table(group, row_group_size=_GROUP_ROWS)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        rename(temporary, path)
    except BaseException:
        if temporary.is_file():
            temporary.unlink()
        raise
    return size, hashed.hexdigest()


def _copied(table: pa.Table) -> pa.Table:
    """A slice as a table of its own: Arrow cannot write slices of some types, views in structs."""
    columns = [
        pa.concat_arrays(table[name].chunks or [table[name].combine_chunks()])
        for name in table.column_names
    ]
    return pa.table(columns, schema=table.schema)


class _Hashed(io.RawIOBase):
    """A file whose bytes are hashed as they are written."""

    def __init__(self, file: Any) -> None:
        self._file, self._hash = file, xxhash.xxh3_128()
        self.hexdigest = self._hash.hexdigest

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self._hash.update(content)
        return int(self._file.write(content))

    def tell(self) -> int:
        return int(self._file.tell())
