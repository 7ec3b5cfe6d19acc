"""Int8 and binary vectors: near the originals, and ranked as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.quantize import Int8Calibration, nearest_binary, rescore, to_binary

DRAWN = np.random.default_rng(0).normal(size=(400, 128)).astype(np.float32)
VECTORS = DRAWN / np.linalg.norm(DRAWN, axis=1, keepdims=True)
CALIBRATION = Int8Calibration.of(VECTORS)


def test_int8_is_nearly_the_vector_and_its_products_are_nearly_theirs() -> None:
    codes = CALIBRATION.encode(VECTORS)
    decoded = CALIBRATION.decode(codes)
    assert codes.dtype == np.int8
    assert decoded.dtype == np.float32
    cosines = (decoded * VECTORS).sum(axis=1) / np.linalg.norm(decoded, axis=1)
    assert cosines.min() > 0.995
    assert np.median(cosines) > 0.9999
    products = codes.astype(np.int32) @ codes[0].astype(np.int32)
    assert np.allclose(products * CALIBRATION.scale**2, VECTORS @ VECTORS[0], atol=0.02)


def test_a_few_huge_numbers_do_not_make_the_others_coarse() -> None:
    spoiled = VECTORS.copy()
    spoiled[3, 5] = 0.5
    scale = Int8Calibration.of(spoiled).scale
    assert scale == pytest.approx(CALIBRATION.scale, rel=0.2)
    assert Int8Calibration(scale, 128).encode(spoiled)[3, 5] == 127
    assert Int8Calibration(scale, 128).encode(-spoiled)[3, 5] == -127


def test_a_calibration_is_kept_as_json(tmp_path: Path) -> None:
    CALIBRATION.save(tmp_path / "int8.json")
    assert Int8Calibration.load(tmp_path / "int8.json") == CALIBRATION


@pytest.mark.parametrize(
    "content",
    ["{}", "[1]", "no JSON", '{"scale": -1, "dimensions": 3}', '{"scale": "a", "dimensions": 3}'],
)
def test_what_is_no_calibration_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "int8.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"int8\.json"):
        Int8Calibration.load(tmp_path / "int8.json")


def test_vectors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"\(2, 64\)"):
        CALIBRATION.encode(np.zeros((2, 64), dtype=np.float32))
    with pytest.raises(ConfigurationError, match=r"\(128,\)"):
        to_binary(VECTORS[0])
    with pytest.raises(ConfigurationError, match="not finite"):
        CALIBRATION.encode(np.full((2, 128), np.nan, dtype=np.float16))
    for nothing in (VECTORS[:0], VECTORS * 0):
        with pytest.raises(ConfigurationError, match="calibrate"):
            Int8Calibration.of(nothing)


def test_binary_finds_candidates_and_rescoring_puts_them_in_order() -> None:
    queries = VECTORS[:20] + 0.05 * DRAWN[20:40]
    bits = to_binary(VECTORS)
    assert bits.shape == (400, 16)
    near = nearest_binary(to_binary(queries), bits, 100)
    hamming = np.unpackbits(bits[near[0]] ^ to_binary(queries)[0], axis=1).sum(axis=1)
    assert (np.diff(hamming.astype(int)) >= 0).all()
    exact = np.argsort(-(queries @ VECTORS.T), axis=1)
    for documents in (VECTORS, VECTORS.astype(np.float16), CALIBRATION.encode(VECTORS)):
        best = rescore(queries, near, documents, 10)
        assert (best[:, 0] == np.arange(20)).all()
        same = np.mean([np.isin(a, b[:10]).mean() for a, b in zip(best, exact, strict=True)])
        assert same > 0.85
    order = [(queries[0] @ VECTORS[row]) for row in rescore(queries, near, VECTORS, 10)[0]]
    assert order == sorted(order, reverse=True)


def test_a_store_that_fills_up_with_negative_rows_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="negative"):
        rescore(VECTORS[:1], np.array([[0, -1]]), VECTORS, 2)


def test_fewer_documents_than_results() -> None:
    near = nearest_binary(to_binary(VECTORS[:2]), to_binary(VECTORS[:3]), 10)
    assert near.shape == (2, 3)
    assert rescore(VECTORS[:2], near, VECTORS[:3], 10)[:, 0].tolist() == [0, 1]
    assert nearest_binary(to_binary(VECTORS[:0]), to_binary(VECTORS[:3]), 10).shape == (0, 3)
