"""What a caller gets: numpy arrays, and the lists of Python floats that frameworks demand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kalm_integrations import floats
from kalm_integrations.errors import InvalidResponseError, InvalidText

if TYPE_CHECKING:
    from kalm_integrations.codec import VectorDtype
    from kalm_integrations.identity import VectorIdentity


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call cost. `tokens` are the model's own, instructions included; of identical texts
    only the first is counted, since only the first is embedded."""

    tokens: int = 0
    requests: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.tokens + other.tokens, self.requests + other.requests)


@dataclass(frozen=True, eq=False)
class EmbeddingResult:
    """Vectors in the order of the texts.

    Attributes:
        vectors: Shape (texts, dimensions), float32, each row of unit length.
        dtype: The type that travelled.
        identity: What these vectors may be compared with.
        usage: What the call cost.
    """

    vectors: NDArray[np.float32] = field(repr=False)
    dtype: VectorDtype
    identity: VectorIdentity
    usage: Usage

    @property
    def packed(self) -> NDArray[np.floating[Any]]:
        """`vectors` in the type that travelled, exactly: half the memory, if that is float16."""
        return self.vectors.astype(self.dtype, copy=False)

    def to_lists(self) -> list[list[float]]:
        """One list of Python floats a text, as LangChain and LlamaIndex take them."""
        return floats.to_lists(self.packed)

    def __len__(self) -> int:
        return len(self.vectors)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.vectors, dtype=dtype, copy=copy)


@dataclass(frozen=True, eq=False)
class EmbeddedBatch:
    """A part of a call's answer, as `iter_embed` yields it.

    Attributes:
        indices: Where each row belongs in the caller's texts, shape (n,), int64. Identical
            texts have identical rows.
        packed: Shape (n, dimensions), in the type that travelled.
        usage: What this part cost.
        rejected: With on_error="skip", the texts that have no vector, and why.
    """

    indices: NDArray[np.int64]
    packed: NDArray[np.floating[Any]] = field(repr=False)
    usage: Usage
    rejected: tuple[InvalidText, ...] = ()

    @property
    def vectors(self) -> NDArray[np.float32]:
        """Shape (n, dimensions), float32, each row of unit length."""
        # Kept, but not by cached_property: Python 3.11 guards that by one lock for all instances,
        # and a process forked while another thread holds it waits for ever.
        kept = self.__dict__
        if "_vectors" not in kept:
            wide = floats.widen(self.packed)
            kept["_vectors"] = wide if wide.flags.writeable else wide.copy()
        vectors: NDArray[np.float32] = kept["_vectors"]
        return vectors

    def write_into(self, vectors: NDArray[np.floating[Any]], start: int = 0) -> None:
        """Write each row to its place, widened where that is float32.

        Args:
            vectors: Where they belong, one a row.
            start: Index of the text that the first row of `vectors` is of.

        Raises:
            InvalidResponseError: The rows are not of that many texts, or of other dimensions:
                numpy would repeat a single row, or a single number, to fill the places.
        """
        if not len(self):  # it may not know the dimensions
            return
        places = (len(self), vectors.shape[1])
        if self.packed.shape != places:
            raise InvalidResponseError(f"vectors of shape {self.packed.shape}, not {places}.")
        wide = vectors.dtype == np.float32
        vectors[self.indices - start] = floats.widen(self.packed) if wide else self.packed

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(index, vector) pairs."""
        return zip(self.indices.tolist(), self.vectors, strict=True)


@dataclass(frozen=True, eq=False)
class PartialResult:
    """What a failed call had finished: `vectors[k]` is of the caller's text `indices[k]`."""

    total: int
    indices: NDArray[np.int64] = field(repr=False)
    vectors: NDArray[np.float32] = field(repr=False)

    @property
    def missing(self) -> NDArray[np.int64]:
        """Indices of the texts that have no vector yet."""
        return np.setdiff1d(np.arange(self.total), self.indices)

    def __len__(self) -> int:
        return len(self.indices)
