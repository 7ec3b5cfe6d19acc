"""What the service hands out, whatever the engine gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scripted import vectors_of
from scripted_engine import ScriptedEngine

from kalm_integrations.errors import InvalidResponseError
from kalm_integrations.protocol import EmbedRequest
from modal_backend.service import EmbeddingService

TEXTS = ["a", "b", "c", "d"]


def row_times(factor: float, *rows: int) -> Any:
    def spoil(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        vectors[list(rows)] *= np.float32(factor)
        return vectors

    return spoil


def with_value(value: float, row: int) -> Any:
    def spoil(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        vectors[row, 7] = value
        return vectors

    return spoil


async def served(spoil: Any, dtype: Any = "float32", dimensions: int | None = None) -> Any:
    request = EmbedRequest(texts=TEXTS, role="document", dtype=dtype, dimensions=dimensions)
    engine = ScriptedEngine(spoil)
    engine.dimensions = (512, 64, 8)
    return (await EmbeddingService(engine).embed(request)).vectors


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_value(np.nan, 1), r"texts\[1\] got values that are not finite\."),
        (with_value(-np.inf, 3), r"texts\[3\] got values that are not finite\."),
        (row_times(0, 2), r"texts\[2\] got a vector of length 0\.0000 instead of 1\."),
        (row_times(1.01, 0), r"texts\[0\] got a vector of length 1\.0100 instead of 1\."),
        (row_times(3, 1, 2, 3), r"texts\[1\] got .*; texts\[2\] got .*; texts\[3\] got .*\."),
        (lambda vectors: vectors[:-1], r"\(3, 512\) instead of \(4, 512\)"),
    ],
)
async def test_an_invalid_vector_is_never_returned(spoil: Any, message: str, dtype: str) -> None:
    with pytest.raises(InvalidResponseError, match=message):
        await served(spoil, dtype)


async def test_rounding_errors_are_accepted() -> None:
    vectors = await served(row_times(1.0005, 0, 1, 2, 3))
    assert np.allclose(vectors, vectors_of(TEXTS, "float32"), atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("dimensions", [None, 512, 64, 8])
async def test_vectors_are_shortened_to_the_requested_dimensions(
    dimensions: int | None, dtype: str
) -> None:
    vectors = await served(lambda vectors: vectors, dtype, dimensions)
    right = vectors_of(TEXTS, "float32")[:, :dimensions]
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    assert vectors.dtype == dtype
    assert vectors.flags.c_contiguous
    np.testing.assert_allclose(vectors, right, atol=1e-6 if dtype == "float32" else 5e-4)


async def test_a_vector_that_is_zero_after_shortening_is_refused() -> None:
    def begins_with_zeros(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        vectors[2] = 0
        vectors[2, 9] = 1
        return vectors

    with pytest.raises(InvalidResponseError, match=r"texts\[2\] got a vector of length 0\.0000"):
        await served(begins_with_zeros, dimensions=8)
