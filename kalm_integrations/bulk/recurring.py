"""Vectors of texts that come again in a later shard, on disk until the job is done.

Each distinct text is embedded once, however far apart its copies are, and memory does not grow with
the number of copies.
"""

from __future__ import annotations

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
        self._vectors: NDArray[Any] | None = None
        if len(self._rows):
            size = len(self._rows) * width * np.dtype(dtype).itemsize
            mode = "r+" if self._path.exists() and self._path.stat().st_size == size else "w+"
            shape = (len(self._rows), width)
            self._vectors = np.memmap(self._path, dtype=dtype, mode=mode, shape=shape)  # type: ignore[call-overload]

    def keep(self, rows: NDArray[np.int64], vectors: NDArray[Any]) -> None:
        """Keep those of `vectors` whose rows recur."""
        if self._vectors is not None:
            slots = np.searchsorted(self._rows, rows)
            slots[slots == len(self._rows)] = 0
            recur = self._rows[slots] == rows
            self._vectors[slots[recur]] = vectors[recur]

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The vectors of rows that recur."""
        assert self._vectors is not None
        taken: NDArray[Any] = self._vectors[np.searchsorted(self._rows, rows)]
        return taken

    def sync(self) -> None:
        """To the disk. Called before a shard whose texts recur is called finished."""
        if isinstance(self._vectors, np.memmap):
            self._vectors.flush()

    def remove(self) -> None:
        """The job is done."""
        self._vectors = None
        self._path.unlink(missing_ok=True)
