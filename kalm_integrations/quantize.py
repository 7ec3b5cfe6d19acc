"""Smaller vectors: int8 with one scale for all numbers, and binary with rescoring.

These are formats of stored vectors, not of the model's weights (`kalm quantize`). Inner products of
int8 vectors are those of the originals times a constant, so any store ranks them alike.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.errors import ConfigurationError

Floats = NDArray[np.floating[Any]]

_SAMPLE: Final = 1024
_CLIPPED: Final = (0.0, 1e-4, 1e-3, 1e-2)
"""Shares of the largest numbers that a calibration may cut, to keep the others finer."""
_BITS_SET: Final = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint16)


@dataclass(frozen=True, slots=True)
class Int8Calibration:
    """How numbers become int8: `number / scale`, rounded, within -127 to 127.

    All vectors of an index, and its queries, need the same one.

    Attributes:
        scale: What 1 stands for.
        dimensions: Of the vectors that it was made from.
    """

    scale: float
    dimensions: int

    def __post_init__(self) -> None:
        if not (0 < self.scale < float("inf") and self.dimensions > 0):
            raise ConfigurationError(
                f"scale={self.scale!r}, dimensions={self.dimensions!r}: both are positive numbers."
            )

    @classmethod
    def of(cls, vectors: Floats) -> Self:
        """Calibrate with a sample of the vectors to store; some hundred suffice.

        Args:
            vectors: Shape (rows, dimensions), of one model and one role.

        Raises:
            ConfigurationError: They are no table of finite numbers, or all zero.
        """
        _check(vectors)
        step = -(-len(vectors) // _SAMPLE) or 1
        sample = np.asarray(vectors[::step], dtype=np.float32)
        if not sample.any():
            raise ConfigurationError("no vector to calibrate with: pass some of the vectors.")
        sizes = np.abs(sample)
        scales = [float(np.quantile(sizes, 1 - share)) / 127 for share in _CLIPPED]
        candidates = [cls(scale, sample.shape[1]) for scale in scales if scale > 0]
        return min(candidates, key=lambda each: each._error(sample))

    def encode(self, vectors: Floats) -> NDArray[np.int8]:
        """The vectors as int8, in the same shape."""
        _check(vectors, self.dimensions)
        codes: NDArray[np.float32] = np.rint(np.asarray(vectors, dtype=np.float32) / self.scale)
        return np.clip(codes, -127, 127).astype(np.int8)

    def decode(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """The numbers that int8 vectors stand for; near unit length, not exactly."""
        return np.multiply(codes, self.scale, dtype=np.float32)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` has written.

        Raises:
            ConfigurationError: The file holds no calibration.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{path} holds no calibration: {error}") from error

    def _error(self, sample: NDArray[np.float32]) -> float:
        return float(np.square(self.decode(self.encode(sample)) - sample).mean())


def to_binary(vectors: Floats) -> NDArray[np.uint8]:
    """One bit a number, 1 if it is above 0, packed: shape (rows, dimensions / 8)."""
    _check(vectors)
    return np.packbits(vectors > 0, axis=1)


def nearest_binary(
    queries: NDArray[np.uint8], documents: NDArray[np.uint8], k: int
) -> NDArray[np.int64]:
    """Rows of the `k` documents that share most bits with each query, nearest first.

    Args:
        queries: From `to_binary`.
        documents: The same, all of them in memory.
        k: How many; to rescore them, several times what is wanted.

    Returns:
        Shape (queries, k), or fewer columns if there are fewer documents.
    """
    found = [
        np.argsort(_BITS_SET[documents ^ query].sum(axis=1), kind="stable")[:k] for query in queries
    ]
    return np.array(found, dtype=np.int64).reshape(len(queries), min(k, len(documents)))


def rescore(
    queries: Floats,
    candidates: NDArray[np.int64],
    documents: Floats | NDArray[np.int8],
    k: int,
) -> NDArray[np.int64]:
    """The `k` best candidates of each query by inner product, best first.

    Args:
        queries: As the client returns them.
        candidates: Rows of `documents` for each query, from `nearest_binary` or from a store.
        documents: float16, float32 or int8 vectors; a memory map will do.
        k: How many.

    Raises:
        ConfigurationError: A candidate is negative, with which stores fill up short rows.
    """
    if (candidates < 0).any():
        raise ConfigurationError("a candidate is negative, so it is no row: leave it out.")
    best = [
        rows[np.argsort(-(documents[rows].astype(np.float32) @ query), kind="stable")[:k]]
        for query, rows in zip(queries.astype(np.float32), candidates, strict=True)
    ]
    return np.array(best, dtype=np.int64).reshape(len(queries), min(k, candidates.shape[1]))


def _check(vectors: Floats, dimensions: int | None = None) -> None:
    if vectors.ndim != 2 or dimensions not in (None, vectors.shape[1]):
        wanted = "(rows, dimensions)" if dimensions is None else f"(rows, {dimensions})"
        raise ConfigurationError(f"vectors of shape {vectors.shape}: {wanted} is needed.")
    if not np.isfinite(vectors.sum(dtype=np.float64)):
        raise ConfigurationError("vectors hold numbers that are not finite: leave these rows out.")
