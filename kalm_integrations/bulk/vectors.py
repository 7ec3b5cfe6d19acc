"""Vectors that are kept so that no text is paid for twice: by this job, or by an earlier one."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from io import FileIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from kalm_integrations.bulk.manifest import Job, Manifest, file_digest
from kalm_integrations.bulk.shards import FOLDER, TRUNCATED
from kalm_integrations.bulk.tables import python_texts
from kalm_integrations.errors import ConfigurationError

KEPT: Final = ".vectors"
"""The folder of `VectorFile`s in a job's output, while the job is not complete."""
_GROUPS_IN_MEMORY: Final = 12


class VectorFile:
    """Vectors in numbered slots of a file. Each has its text's key and a checksum, so that a slot
    that is missing, damaged or another text's is no vector. The file is made with the first."""

    def __init__(self, path: Path, width: int, dtype: str) -> None:
        self._path = path
        self._type = np.dtype(
            [("key", "<u8", 2), ("truncated", "?"), ("vector", dtype, (width,)), ("sum", "<u8")]
        )
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
        if not len(slots):
            return
        if self._file is None:
            self._path.parent.mkdir(exist_ok=True)
            self._file = FileIO(self._path, "w+b")
        order = np.argsort(slots)
        records = np.zeros(len(slots), dtype=self._type)
        records["key"], records["vector"] = keys[order], vectors[order]
        records["truncated"] = truncated[order]
        records["sum"] = _sums(records)
        slots = slots[order]
        # Neighbours are written at once.
        for run in np.split(np.arange(len(slots)), np.flatnonzero(np.diff(slots) != 1) + 1):
            content = _bytes_of(records[run[0] : run[-1] + 1])
            self._file.seek(int(slots[run[0]]) * self._type.itemsize)
            while content:
                content = content[self._file.write(content) :]

    def get(
        self, slots: NDArray[np.int64], keys: NDArray[np.uint64]
    ) -> tuple[NDArray[np.bool_], NDArray[Any], NDArray[np.bool_]]:
        """(found, vectors, truncated) of slots, for texts with these keys."""
        records = np.zeros(len(slots), dtype=self._type)
        if self._file is not None:
            for number, slot in enumerate(slots.tolist()):
                self._file.seek(slot * self._type.itemsize)
                content = self._file.read(self._type.itemsize)
                if len(content) == self._type.itemsize:
                    # Not a record's bytes as they are: a flag may be any byte in a damaged file.
                    records[number] = np.frombuffer(content, dtype=self._type)[0]
        found = (records["key"] == keys).all(axis=1) & (records["sum"] == _sums(records))
        return found, records["vector"], records["truncated"]

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


def _bytes_of(records: NDArray[Any]) -> memoryview:
    return records.view(np.uint8).data.cast("B")


def _sums(records: NDArray[Any]) -> NDArray[np.uint64]:
    if not len(records):
        return np.zeros(0, dtype=np.uint64)
    content, step = _bytes_of(records), records.dtype.itemsize
    starts = range(0, len(content), step)
    sums = [xxhash.xxh3_64_intdigest(content[s : s + step - 8], seed=1) for s in starts]
    return np.array(sums, dtype=np.uint64)


class EarlierVectors:
    """Vectors of complete outputs that a job wants to use, found by their texts.

    Raises:
        ConfigurationError: One is not a complete output, or damaged, or its vectors differ.
    """

    def __init__(self, folders: tuple[str, ...], job: Job) -> None:
        self._files: list[tuple[Path, str]] = []
        self._groups: OrderedDict[tuple[int, int], tuple[NDArray[Any], NDArray[np.bool_]]] = (
            OrderedDict()
        )
        keys: list[bytes] = []
        where: list[NDArray[np.int64]] = []
        for folder in folders:
            self._index(Path(folder), job, keys, where)
        found = np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)
        order = np.argsort(found[:, 0], kind="stable")
        self._keys = found[order]
        self._where = np.concatenate([*where, np.empty((0, 3), dtype=np.int64)])[order]

    def find(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """For each text, an entry of the index; -1 where there is none."""
        if not len(self._keys):
            return np.full(len(keys), -1)
        at = np.searchsorted(self._keys[:, 0], keys[:, 0])
        at[at == len(self._keys)] = 0
        return np.where((self._keys[at] == keys).all(axis=1), at, -1)

    def get(self, entries: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Vectors of entries, and whether their texts were cut."""
        vectors: list[Any] = [None] * len(entries)
        truncated = np.zeros(len(entries), dtype=np.bool_)
        for number in np.lexsort(self._where[entries].T[::-1]).tolist():
            file, group, row = self._where[entries[number]].tolist()
            group_vectors, group_truncated = self._group(file, group)
            vectors[number], truncated[number] = group_vectors[row], group_truncated[row]
        return np.array(vectors), truncated

    def _index(
        self, folder: Path, job: Job, keys: list[bytes], where: list[NDArray[np.int64]]
    ) -> None:
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
        for shard in manifest.shards:
            path = folder / FOLDER / shard.name
            check_shard(path, shard.bytes, shard.digest)
            number = len(self._files)
            self._files.append((path, manifest.job.vector_column))
            nulls = shard.rejected > 0 and manifest.job.on_error == "null"
            names = [manifest.job.text_column, *([manifest.job.vector_column] if nulls else [])]
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, names)
                    rows = np.arange(len(table))
                    if nulls:
                        rows = np.flatnonzero(table.column(1).is_valid())
                        table = table.filter(table.column(1).is_valid())
                    texts = python_texts(table.column(0))
                    keys += [hashlib.sha256(t.encode()).digest()[:16] for t in texts]
                    entries = [(number, group, row) for row in rows.tolist()]
                    where.append(np.array(entries, dtype=np.int64).reshape(-1, 3))

    def _group(self, file: int, group: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        if (file, group) not in self._groups:
            path, name = self._files[file]
            with pq.ParquetFile(path) as opened:
                columns = [name, *([TRUNCATED] if TRUNCATED in opened.schema_arrow.names else [])]
                table = opened.read_row_group(group, columns)
            column = table[name].combine_chunks()
            flat = column.values.to_numpy(zero_copy_only=False)
            vectors = flat.reshape(len(table), column.type.list_size)
            truncated = np.zeros(len(table), dtype=np.bool_)
            if TRUNCATED in table.column_names:
                truncated = table[TRUNCATED].to_numpy(zero_copy_only=False)
            self._groups[file, group] = vectors, truncated
            if len(self._groups) > _GROUPS_IN_MEMORY:
                self._groups.popitem(last=False)
        self._groups.move_to_end((file, group))
        return self._groups[file, group]


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
