"""Rows into their places: a call's parts become its result, or its error's `partial`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.errors import InvalidResponseError, KalmError
from kalm_integrations.identity import VectorIdentity
from kalm_integrations.result import EmbeddedBatch, EmbeddingResult, PartialResult, Usage
from kalm_integrations.wire import VectorDtype


class Assembly:
    """The vectors of one call, filled in as its parts arrive, in any order."""

    def __init__(self, total: int, dimensions: int, dtype: VectorDtype) -> None:
        # Without dimensions, the first part tells them.
        self._vectors: NDArray[np.floating[Any]] = np.empty((total, dimensions), dtype=dtype)
        self._filled = np.zeros(total, dtype=np.bool_)
        self.usage = Usage()

    def add(self, part: EmbeddedBatch) -> None:
        """Put `part`'s rows where they belong."""
        if not self._vectors.shape[1]:
            self._vectors = np.empty((len(self._filled), part.packed.shape[1]), part.packed.dtype)
        self._vectors[part.indices] = part.packed
        self._filled[part.indices] = True
        self.usage += part.usage

    def result(self, identity: VectorIdentity) -> EmbeddingResult:
        """All vectors.

        Raises:
            InvalidResponseError: A row was never filled. Unfilled memory is never handed out.
        """
        if not self._filled.all():
            missing = int(np.flatnonzero(~self._filled)[0])
            raise InvalidResponseError(f"texts[{missing}] got no vector.")
        return EmbeddingResult(self._vectors, identity, self.usage)

    @contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """A `KalmError` that leaves this block carries what was filled, as `partial`."""
        try:
            yield
        except KalmError as error:
            indices = np.flatnonzero(self._filled)
            vectors = self._vectors[indices].astype(np.float32, copy=False)
            error.partial = PartialResult(len(self._filled), indices, vectors)
            raise
