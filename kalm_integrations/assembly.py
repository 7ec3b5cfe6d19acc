"""Rows into their places: a call's parts become its result, or its error's `partial`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.codec import VectorDtype
from kalm_integrations.errors import InvalidResponseError, KalmError
from kalm_integrations.floats import to_lists
from kalm_integrations.identity import VectorIdentity
from kalm_integrations.result import EmbeddedBatch, EmbeddingResult, PartialResult, Usage


class Assembly(ABC):
    """The vectors of one call, filled in as its parts arrive, in any order."""

    def __init__(self, total: int) -> None:
        self._filled = np.zeros(total, dtype=np.bool_)
        self.usage = Usage()

    def add(self, part: EmbeddedBatch) -> None:
        """Put `part`'s rows where they belong."""
        self._put(part)
        self._filled[part.indices] = True
        self.usage += part.usage

    @contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """A `KalmError` that leaves this block carries what was filled, as `partial`."""
        try:
            yield
        except KalmError as error:
            indices = np.flatnonzero(self._filled)
            error.partial = PartialResult(len(self._filled), indices, self._taken(indices))
            raise

    def _check(self) -> None:
        # Unfilled memory is never handed out.
        if not self._filled.all():
            missing = int(np.flatnonzero(~self._filled)[0])
            raise InvalidResponseError(f"texts[{missing}] got no vector.")

    @abstractmethod
    def _put(self, part: EmbeddedBatch) -> None: ...

    @abstractmethod
    def _taken(self, indices: NDArray[np.int64]) -> NDArray[np.float32]: ...


class ArrayAssembly(Assembly):
    """One array of them, widened part by part while later ones are on their way.

    Args:
        total: Number of texts.
        dimensions: Of the vectors; 0 where the first part tells.
        dtype: The type that travels.
    """

    def __init__(self, total: int, dimensions: int, dtype: VectorDtype) -> None:
        super().__init__(total)
        self._dtype: VectorDtype = dtype
        self._vectors = np.empty((total, dimensions), dtype=np.float32)

    def result(self, identity: VectorIdentity) -> EmbeddingResult:
        """All vectors.

        Raises:
            InvalidResponseError: A row was never filled.
        """
        self._check()
        return EmbeddingResult(self._vectors, self._dtype, identity, self.usage)

    def _put(self, part: EmbeddedBatch) -> None:
        if not self._vectors.shape[1]:
            self._vectors = np.empty((len(self._filled), part.packed.shape[1]), np.float32)
        part.write_into(self._vectors)

    def _taken(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._vectors[indices]


class ListAssembly(Assembly):
    """Lists of Python floats, converted while later parts are on their way."""

    def __init__(self, total: int, dimensions: int) -> None:
        super().__init__(total)
        self._dimensions = dimensions
        self._rows: list[list[float]] = [[]] * total

    def result(self) -> list[list[float]]:
        """All vectors.

        Raises:
            InvalidResponseError: A row was never filled.
        """
        self._check()
        return self._rows

    def _put(self, part: EmbeddedBatch) -> None:
        for index, row in zip(part.indices.tolist(), to_lists(part.packed), strict=True):
            self._rows[index] = row

    def _taken(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        rows = [self._rows[index] for index in indices.tolist()]
        return np.array(rows, dtype=np.float32).reshape(len(rows), -1 if rows else self._dimensions)
