"""Vectors that are kept so that no text is paid for twice: by this job, or by an earlier one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from kalm_integrations.bulk.manifest import Job, Manifest, file_digest
from kalm_integrations.bulk.parts import Part
from kalm_integrations.bulk.plan import Plan
from kalm_integrations.bulk.shards import FOLDER, TRUNCATED, ShardBuilder
from kalm_integrations.bulk.tables import python_texts
from kalm_integrations.errors import ConfigurationError

KEPT: Final = ".vectors"
"""The folder of `VectorFile`s in a job's output, while the job is not complete."""
_GROUPS_IN_MEMORY: Final = 12


class VectorFile:
    """Vectors in numbered slots of a file. Each has its text's key and a checksum, so that a slot
    that is missing, damaged or another text's is no vector. The file is made with the first."""

    def __init__(self, path: Path, width: int, dtype: str) -> None:
        self._path, self._width, self._dtype = path, width, np.dtype(dtype)
        self._record_bytes = 16 + 1 + width * self._dtype.itemsize + 8
        # No memory map: a full disk would end the process there and then.
        self._file = FileIO(path, "r+b") if path.exists() else None
        self.is_empty = self._file is None
        """Whether no earlier run has left anything in it."""

    def put(
        self,
        slots: NDArray[np.int64],
        keys: NDArray[np.uint64],
        vectors: NDArray[Any],
        truncated: NDArray[np.bool_],
    ) -> None:
        """Keep vectors.

        Raises:
            OSError: The disk is full, for instance.
        """
        if self._file is None and len(slots):
            self._path.parent.mkdir(exist_ok=True)
            self._file = FileIO(self._path, "w+b")
        vectors = vectors.astype(self._dtype, copy=False)
        for number, slot in enumerate(slots.tolist()):
            content = keys[number].tobytes() + truncated[number].tobytes()
            content += vectors[number].tobytes()
            self._file.seek(slot * self._record_bytes)  # type: ignore[union-attr]
            # What a full disk cuts short has no checksum; the next write fails.
            self._file.write(content + xxhash.xxh3_64_digest(content))  # type: ignore[union-attr]

    def get(
        self, slots: NDArray[np.int64], keys: NDArray[np.uint64]
    ) -> tuple[NDArray[np.bool_], NDArray[Any], NDArray[np.bool_]]:
        """(found, vectors, truncated) of slots, for texts with these keys."""
        found, truncated = np.zeros((2, len(slots)), dtype=np.bool_)
        vectors = np.zeros((len(slots), self._width), dtype=self._dtype)
        if self._file is None:
            return found, vectors, truncated
        for number, slot in enumerate(slots.tolist()):
            self._file.seek(slot * self._record_bytes)
            record = self._file.read(self._record_bytes)
            content, checksum = record[:-8], record[-8:]
            same = content[:16] == keys[number].tobytes()
            if same and checksum == xxhash.xxh3_64_digest(content):
                found[number], truncated[number] = True, content[16]
                vectors[number] = np.frombuffer(content[17:], self._dtype)
        return found, vectors, truncated

    def sync(self) -> None:
        """Write it to the disk, before a shard that it belongs to counts as finished."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Close and delete the file."""
        self.close()
        self._path.unlink(missing_ok=True)


class RecurringTexts:
    """Gives rows the vectors of earlier shards of the job.

    Args:
        plan: It says which texts recur in later shards.
        file: Of their vectors.
        refused: Why finished shards have no vector of a text, by its row of the input.
    """

    def __init__(self, plan: Plan, file: VectorFile, refused: dict[int, str]) -> None:
        first, size = plan.first, plan.options.shard_rows
        later = (first >= 0) & (np.arange(plan.rows) // size != first // size)
        self._rows = np.unique(first[later])
        self._refused, self.file = refused, file

    def copy(self, builder: ShardBuilder) -> tuple[int, list[tuple[int, str]]]:
        """How many rows got the vector of an earlier shard; and texts whose vector was lost."""
        part = builder.part
        for row in builder.copied_rows().tolist():
            if reason := self._refused.get(int(part.first[row])):
                builder.reasons[row] = reason
        rows = builder.copied_rows()
        slots = np.searchsorted(self._rows, part.first[rows])
        found, vectors, cut = self.file.get(slots, part.keys[rows])
        builder.vectors[rows[found]], builder.truncated[rows[found]] = vectors[found], cut[found]
        return int(found.sum()), [(row, part.texts[row]) for row in rows[~found].tolist()]

    def keep(self, builder: ShardBuilder) -> None:
        """Keep what later shards need of this one, once it has all of its vectors."""
        part = builder.part
        new = builder.reasons.keys() - part.reasons.keys()
        self._refused |= {part.start + row: builder.reasons[row] for row in new}
        begin, end = np.searchsorted(self._rows, [part.start, part.start + len(part)])
        rows, slots = self._rows[begin:end] - part.start, np.arange(begin, end)
        good = np.isin(rows, list(builder.reasons), invert=True)
        rows, slots = rows[good], slots[good]
        self.file.put(slots, part.keys[rows], builder.vectors[rows], builder.truncated[rows])


class EarlierVectors:
    """Vectors of complete outputs that a job wants to use, found by their texts.

    Raises:
        ConfigurationError: One is not a complete output, or damaged, or its vectors differ.
    """

    def __init__(self, folders: tuple[str, ...], job: Job) -> None:
        self._files: list[tuple[Path, str]] = []
        self._group = lru_cache(_GROUPS_IN_MEMORY)(self._read_group)
        groups = [group for folder in folders for group in self._index(Path(folder), job)]
        keys = np.frombuffer(b"".join(keys for keys, _ in groups), dtype="<u8").reshape(-1, 2)
        order = np.argsort(keys[:, 0], kind="stable")
        self._keys = keys[order]
        none = np.empty((0, 3), dtype=np.int64)
        self._where = np.concatenate([none, *(where for _, where in groups)])[order]

    def give(self, part: Part) -> None:
        """Give a part the vectors that there are of its texts."""
        rows = np.flatnonzero(part.first >= 0)
        if not len(self._keys):
            return
        at = np.searchsorted(self._keys[:, 0], part.keys[rows, 0])
        at[at == len(self._keys)] = 0
        same = (self._keys[at] == part.keys[rows]).all(axis=1)
        rows, where = rows[same], self._where[at[same]]
        for number in np.lexsort(where.T[::-1]).tolist():  # group by group
            file, group, row = where[number].tolist()
            vectors, truncated = self._group(file, group)
            part.vectors[int(rows[number])] = vectors[row].copy(), bool(truncated[row])

    def _index(self, folder: Path, job: Job) -> Iterator[tuple[bytes, NDArray[np.int64]]]:
        """Keys of texts, and where each vector is: (file, group, row)."""
        manifest = Manifest.read(folder)
        if manifest is None or not manifest.complete:
            what = "has no manifest.json" if manifest is None else "is not complete: finish it"
            raise ConfigurationError(f"--reuse {folder} {what}.")
        job.vector_identity.check(manifest.job.vector_identity)
        for name in ("vector_dtype", "truncate"):
            mine, theirs = getattr(job, name), getattr(manifest.job, name)
            if mine != theirs:
                raise ConfigurationError(
                    f"--reuse {folder}: {name} is {theirs!r} there, and {mine!r} here."
                )
        columns = [manifest.job.text_column, manifest.job.vector_column]
        for shard in manifest.shards:
            path = folder / FOLDER / shard.name
            check_shard(path, shard.bytes, shard.digest)
            number = len(self._files)
            self._files.append((path, manifest.job.vector_column))
            nulls = shard.rejected > 0 and manifest.job.on_error == "null"
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns if nulls else columns[:1])
                    rows = np.arange(len(table))
                    if nulls:
                        rows = np.flatnonzero(table.column(1).is_valid())
                        table = table.take(rows)
                    texts = python_texts(table.column(0))
                    keys = [hashlib.sha256(text.encode()).digest()[:16] for text in texts]
                    places = np.full((len(rows), 3), (number, group, 0), dtype=np.int64)
                    places[:, 2] = rows
                    yield b"".join(keys), places

    def _read_group(self, file: int, group: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        path, name = self._files[file]
        with pq.ParquetFile(path) as opened:
            columns = [name, *({TRUNCATED} & {*opened.schema_arrow.names})]
            table = opened.read_row_group(group, columns)
        column = table[name].combine_chunks()
        flat = column.values.to_numpy(zero_copy_only=False)
        truncated = np.zeros(len(table), dtype=np.bool_)
        if TRUNCATED in table.column_names:
            truncated = table[TRUNCATED].to_numpy(zero_copy_only=False)
        return flat.reshape(len(table), column.type.list_size), truncated


def check_shard(path: Path, size: int, digest: str) -> None:
    """Check that a finished shard is as it was written.

    Raises:
        ConfigurationError: It is missing, or was changed.
    """
    same = path.is_file() and path.stat().st_size == size
    if not same or (digest and file_digest(path) != digest):
        raise ConfigurationError(
            f"{path} is missing or was changed since it was written: restore it from a copy, or "
            "choose another --output."
        )
