"""Vectors of texts that come again in a later shard, on disk until the job is done.

Each distinct text is embedded once, however far apart its copies are, and memory does not grow with
the number of copies.
"""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

NAME: Final = ".recurring"


class Recurring:
    """A slot for each text that recurs.

    Args:
        folder: Of the job.
        first: For each row of the input, the row that has its text first; -1 of a bad one.
        shard_rows: Rows of each shard.
        width: Dimensions.
        dtype: Of the vectors.
    """

    def __init__(
        self, folder: Path, first: NDArray[np.int64], shard_rows: int, width: int, dtype: str
    ) -> None:
        rows = np.arange(len(first))
        later = (first >= 0) & (rows // shard_rows != first // shard_rows)
        self._rows = np.unique(first[later])
        self._path = folder / NAME
        self._width, self._dtype = width, np.dtype(dtype)
        self._file: FileIO | None = None
        if len(self._rows):
            # No memory map: a full disk would end the process there and then.
            self._file = FileIO(self._path, "r+b" if self._path.exists() else "x+b")

    def keep(self, rows: NDArray[np.int64], vectors: NDArray[Any]) -> None:
        """Keep those of `vectors` whose rows recur.

        Raises:
            OSError: The disk is full, for instance.
        """
        if self._file is None:
            return
        slots = np.searchsorted(self._rows, rows)
        slots[slots == len(self._rows)] = 0
        for place in np.flatnonzero(self._rows[slots] == rows).tolist():
            content = memoryview(vectors[place].tobytes())
            self._file.seek(int(slots[place]) * len(content))
            while content:
                content = content[self._file.write(content) :]

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The vectors of rows that recur; zeros where the file has none."""
        assert self._file is not None
        taken = np.zeros((len(rows), self._width), dtype=self._dtype)
        for vector, slot in zip(taken, np.searchsorted(self._rows, rows).tolist(), strict=True):
            self._file.seek(slot * vector.nbytes)
            content = self._file.read(vector.nbytes)
            if len(content) == vector.nbytes:
                vector[:] = np.frombuffer(content, dtype=self._dtype)
        return taken

    def sync(self) -> None:
        """To the disk. Called before a shard whose texts recur is called finished."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Of this run."""
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """The job is done."""
        self.close()
        self._path.unlink(missing_ok=True)
