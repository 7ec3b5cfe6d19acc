"""Results: numpy arrays, or the lists of Python floats that frameworks require."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from kalm_integrations import floats
from kalm_integrations.errors import InvalidResponseError, InvalidText

if TYPE_CHECKING:
    from kalm_integrations.identity import VectorIdentity
    from kalm_integrations.protocol import VectorDtype


R = TypeVar("R")
OnTruncated = Callable[[Sequence[int]], object]
"""Called with the indices of texts that were cut."""
_MAX_NAMED: Final = 20
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and requests of a call. `tokens` are those that the model computed, instructions
    included: identical texts are counted once, and texts that were cut up to there. None: a server
    did not report them."""

    tokens: int | None = 0
    requests: int = 0

    def __add__(self, other: Usage) -> Usage:
        unknown = self.tokens is None or other.tokens is None
        tokens = None if unknown else (self.tokens or 0) + (other.tokens or 0)
        return Usage(tokens, self.requests + other.requests)


@dataclass(frozen=True, eq=False)
class EmbeddingResult:
    """Vectors in the order of the texts.

    Attributes:
        vectors: Shape (texts, dimensions), float32, each row of unit length.
        dtype: The type in which the vectors were sent.
        identity: Vectors with the same identity can be compared with these.
        usage: Tokens and requests of the call.
        truncated: Indices of the texts that were cut to the model's length, with truncate="end".
            None: a server did not report them.
    """

    vectors: NDArray[np.float32] = field(repr=False)
    dtype: VectorDtype
    identity: VectorIdentity
    usage: Usage
    truncated: tuple[int, ...] | None = ()

    @property
    def packed(self) -> NDArray[np.floating[Any]]:
        """`vectors` in `dtype`, exactly: half the memory if that is float16."""
        return self.vectors.astype(self.dtype, copy=False)

    def to_lists(self) -> list[list[float]]:
        """One list of Python floats per text, as LangChain and LlamaIndex take them."""
        return floats.to_lists(self.packed)

    def __len__(self) -> int:
        return len(self.vectors)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.vectors, dtype=dtype, copy=copy)


@dataclass(frozen=True, eq=False)
class EmbeddedBatch:
    """A part of a call's result, as `iter_embed` yields it.

    Attributes:
        indices: Index in the caller's texts of each row, shape (n,), int64. Identical texts have
            identical rows.
        packed: Shape (n, dimensions), in the type in which the vectors were sent.
        usage: Tokens and requests of this part.
        rejected: With on_error="skip", the texts that have no vector, and why.
        truncated: As in `EmbeddingResult`.
    """

    indices: NDArray[np.int64]
    packed: NDArray[np.floating[Any]] = field(repr=False)
    usage: Usage
    rejected: tuple[InvalidText, ...] = ()
    truncated: tuple[int, ...] | None = ()

    @property
    def vectors(self) -> NDArray[np.float32]:
        """Shape (n, dimensions), float32, each row of unit length."""
        # Kept, but not by cached_property: Python 3.11 guards that by one lock for all instances,
        # and a process forked while another thread holds it waits for ever.
        vectors: NDArray[np.float32] | None = self.__dict__.get("_vectors")
        if vectors is None:
            wide = floats.widen(self.packed)
            vectors = self.__dict__["_vectors"] = wide if wide.flags.writeable else wide.copy()
        return vectors

    def joined(self, other: EmbeddedBatch) -> EmbeddedBatch:
        """This part and another one, as one."""
        # A part without rows may not know the dimensions.
        rows = [part.packed for part in (self, other) if len(part)] or [self.packed]
        return EmbeddedBatch(
            np.concatenate([self.indices, other.indices]),
            np.concatenate(rows),
            self.usage + other.usage,
            self.rejected + other.rejected,
            _both(self.truncated, other.truncated),
        )

    def write_into(self, vectors: NDArray[np.floating[Any]], start: int = 0) -> None:
        """Write each row to its index, widened if `vectors` is float32.

        Args:
            vectors: One row per text.
            start: Index of the text of the first row of `vectors`.

        Raises:
            InvalidResponseError: Wrong number of rows or dimensions: numpy would repeat a single
                row, or a single number, to fill the array.
        """
        if not len(self):  # it may not know the dimensions
            return
        shape = (len(self), vectors.shape[1])
        if self.packed.shape != shape:
            raise InvalidResponseError(f"vectors of shape {self.packed.shape}, not {shape}.")
        wide = vectors.dtype == np.float32
        vectors[self.indices - start] = floats.widen(self.packed) if wide else self.packed

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(index, vector) pairs."""
        return zip(self.indices.tolist(), self.vectors, strict=True)


@dataclass(frozen=True, eq=False)
class PartialResult:
    """The finished part of a failed call: `vectors[k]` belongs to the text `indices[k]`."""

    total: int
    indices: NDArray[np.int64] = field(repr=False)
    vectors: NDArray[np.float32] = field(repr=False)

    @property
    def missing(self) -> NDArray[np.int64]:
        """Indices of the texts that have no vector yet."""
        return np.setdiff1d(np.arange(self.total), self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class ResultBuilder(ABC, Generic[R]):
    """Collects the parts of one call, which arrive in any order.

    Args:
        total: Number of texts.
        dimensions: Dimensions of the vectors; 0 if the first part decides.
    """

    def __init__(self, total: int, dimensions: int) -> None:
        self._total = total
        self._dimensions = dimensions
        self._truncated: tuple[int, ...] | None = ()

    @abstractmethod
    def add(self, part: EmbeddedBatch) -> None:
        """Put the rows of `part` at their indices."""
        self._truncated = _both(self._truncated, part.truncated)

    @abstractmethod
    def result(self) -> R:
        """All vectors.

        Raises:
            InvalidResponseError: A text got none: uninitialized memory is not returned.
        """

    @abstractmethod
    def partial(self) -> PartialResult:
        """What was added."""


class ArrayBuilder(ResultBuilder[EmbeddingResult]):
    """Builds one float32 array; parts are converted while others are in flight."""

    def __init__(
        self, total: int, dimensions: int, dtype: VectorDtype, identity: VectorIdentity
    ) -> None:
        super().__init__(total, dimensions)
        self.usage = Usage()
        self._filled = np.zeros(total, dtype=np.bool_)
        self._vectors = np.empty((total, dimensions), dtype=np.float32)
        self._dtype: VectorDtype = dtype
        self._identity = identity

    def add(self, part: EmbeddedBatch) -> None:
        if not self._vectors.shape[1]:
            self._vectors = np.empty((self._total, part.packed.shape[1]), np.float32)
        part.write_into(self._vectors)
        super().add(part)
        self._filled[part.indices] = True
        self.usage += part.usage

    def result(self) -> EmbeddingResult:
        if not self._filled.all():
            raise _missing(int(self._filled.argmin()))
        cut = None if self._truncated is None else tuple(sorted(self._truncated))
        return EmbeddingResult(self._vectors, self._dtype, self._identity, self.usage, cut)

    def partial(self) -> PartialResult:
        indices = np.flatnonzero(self._filled)
        return PartialResult(self._total, indices, self._vectors[indices])


class ListBuilder(ResultBuilder[list[list[float]]]):
    """Builds lists of Python floats; parts are converted while others are in flight.

    Args:
        total: See `ResultBuilder`.
        dimensions: See `ResultBuilder`.
        on_truncated: Called with the indices of the texts that were cut, if there are any.
    """

    def __init__(
        self, total: int, dimensions: int, on_truncated: OnTruncated | None = None
    ) -> None:
        super().__init__(total, dimensions)
        self._on_truncated = on_truncated or log_truncated
        self._lists: list[list[float]] = [_NO_ROW] * total

    def add(self, part: EmbeddedBatch) -> None:
        super().add(part)
        for index, row in zip(part.indices.tolist(), floats.to_lists(part.packed), strict=True):
            self._lists[index] = row

    def result(self) -> list[list[float]]:
        for index, row in enumerate(self._lists):
            if row is _NO_ROW:
                raise _missing(index)
        if self._truncated:
            self._on_truncated(sorted(self._truncated))
        return self._lists

    def partial(self) -> PartialResult:
        rows = {index: row for index, row in enumerate(self._lists) if row is not _NO_ROW}
        vectors = np.array([*rows.values()], dtype=np.float32)
        shape = (len(rows), -1 if rows else self._dimensions)
        return PartialResult(self._total, np.array([*rows], np.int64), vectors.reshape(shape))


_NO_ROW: list[float] = []


def log_truncated(indices: Sequence[int]) -> None:
    """Warn of the texts that were cut, of which a list of vectors says nothing."""
    more = f" and {len(indices) - _MAX_NAMED:,} more" if len(indices) > _MAX_NAMED else ""
    log.warning(
        "%d of the texts had more tokens than the model reads; only the beginning of each was "
        'embedded (truncate="end"), by index: %s%s',
        len(indices),
        ", ".join(map(str, indices[:_MAX_NAMED])),
        more,
    )


def _both(first: tuple[int, ...] | None, second: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if first is None or second is None else first + second


def _missing(index: int) -> InvalidResponseError:
    return InvalidResponseError(f"texts[{index}] got no vector.")
