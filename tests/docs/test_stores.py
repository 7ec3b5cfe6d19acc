"""What docs/stores.md says of sizes and limits: recomputed, and tried on the stores at hand."""

from __future__ import annotations

import re
import warnings
from itertools import pairwise
from pathlib import Path

import chromadb
import numpy as np
import pytest
from numpy.typing import NDArray
from qdrant_client import QdrantClient
from qdrant_client.models import Datatype, Distance, PointStruct, VectorParams

from kalm_integrations import KalmClient
from kalm_integrations.errors import IdentityMismatchError
from kalm_integrations.models import EMBEDDED, KALM

with warnings.catch_warnings():
    # faiss says, from Python 3.12 on, that its generated types name no module.
    warnings.filterwarnings("ignore", "builtin type .* has no __module__", DeprecationWarning)
    import faiss

PAGE = (Path(__file__).parents[2] / "docs/stores.md").read_text()
WIDEST = KALM.dimensions[0]
WANTED = 17


def rows(heading: str, head: str) -> list[list[str]]:
    """The cells of the table under `heading` whose head begins with `head`, less the head."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = section[section.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    """Unit vectors as wide as KaLM's."""
    drawn = np.random.default_rng(0).standard_normal((200, WIDEST))
    unit: NDArray[np.float32] = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype("f4")
    return unit


def test_the_sizes() -> None:
    text = " ".join(PAGE.split())
    sizes = "takes {:,} bytes in float32, {:,} in float16, {:,} in int8 and {:,} in binary"
    assert sizes.format(WIDEST * 4, WIDEST * 2, WIDEST, WIDEST // 8) in text
    *others, least = KALM.dimensions[1:]
    assert f"{', '.join(map(str, others))} and {least} dimensions" in text


def test_the_widest_that_fits_each_limit() -> None:
    table = rows("Limits", "store")
    limits = [number(limit.removesuffix(" or more")) for _, limit, _ in table]
    assert all(before <= after for before, after in pairwise(limits))
    for (store, _, widest), limit in zip(table, limits, strict=True):
        assert number(widest) == max(d for d in KALM.dimensions if d <= limit), store
        for name in store.split(", ["):
            assert re.search(r"\]\(https://.+\)|tried, \d", name), name


def test_float16_keeps_more_than_the_models_bf16(vectors: NDArray[np.float32]) -> None:
    bits = vectors.view(np.uint32)
    bf16 = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    lost_by_bf16 = np.abs(bf16 - vectors).mean()
    assert 0 < np.abs(vectors.astype(np.float16) - vectors).mean() < lost_by_bf16 / 6
    result = KalmClient(backend="local").embed(["K2 is 8,611 metres high."])
    assert result.packed.dtype == np.float16
    # What a framework hands to the store goes into a float16 column without a loss.
    assert np.array_equal(np.array(result.to_lists(), dtype=np.float16), result.packed)


@pytest.mark.parametrize("datatype", [Datatype.FLOAT32, Datatype.FLOAT16])
def test_qdrant_takes_the_widest(vectors: NDArray[np.float32], datatype: Datatype) -> None:
    client = QdrantClient(":memory:")
    parameters = VectorParams(size=WIDEST, distance=Distance.DOT, datatype=datatype)
    client.create_collection("wide", parameters)
    client.upsert("wide", [PointStruct(id=i, vector=v.tolist()) for i, v in enumerate(vectors)])
    (hit,) = client.query_points("wide", vectors[WANTED].tolist(), limit=1).points
    assert hit.id == WANTED
    assert hit.score == pytest.approx(1, abs=1e-3)


def test_chroma_takes_the_widest_and_ranks_by_l2_unless_told(
    vectors: NDArray[np.float32], tmp_path: Path
) -> None:
    client = chromadb.PersistentClient(tmp_path)
    told = client.create_collection("told", configuration={"hnsw": {"space": "ip"}})
    assert client.create_collection("untold").configuration["hnsw"]["space"] == "l2"
    told.add(ids=[str(i) for i in range(len(vectors))], embeddings=vectors)
    found = told.query(query_embeddings=vectors[WANTED : WANTED + 1], n_results=1)
    assert found["ids"] == [[str(WANTED)]]
    assert found["distances"] is not None
    assert found["distances"][0][0] == pytest.approx(0, abs=1e-3)  # one minus the product


def test_faiss_takes_the_widest_and_its_graph_costs_what_it_says(
    vectors: NDArray[np.float32],
) -> None:
    graph = faiss.IndexHNSWFlat(WIDEST, 32, faiss.METRIC_INNER_PRODUCT)
    graph.add(vectors)
    assert graph.search(vectors[WANTED : WANTED + 1], 1)[1] == [[WANTED]]
    (stated,) = re.findall(r"in FAISS with 32 links, (\d+) bytes a vector", " ".join(PAGE.split()))
    flat = vectors.nbytes
    each = (len(faiss.serialize_index(graph)) - flat) / len(vectors)
    assert each == pytest.approx(int(stated), rel=0.05)


def test_unit_vectors_rank_alike_by_each_metric(vectors: NDArray[np.float32]) -> None:
    query, others = vectors[0], vectors[1:]
    product = np.argsort(-(others @ query))
    l2 = np.argsort(np.linalg.norm(others - query, axis=1))
    assert (product[:20] == l2[:20]).all()


def test_the_block_refuses_vectors_of_another_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    client = QdrantClient(":memory:")
    monkeypatch.setattr("qdrant_client.QdrantClient", lambda *_: client)
    for _ in range(2):
        store_object: dict[str, object] = {}
        exec(block, store_object)
        assert store_object["client"] is client
    monkeypatch.setenv("KALM_DOCUMENT_INSTRUCTION", "sts")
    differs = r"document_template: 'Instruct: .* != '\{text\}'"
    with pytest.raises(IdentityMismatchError, match=differs):
        exec(block, {})


def test_the_embedded_engine_has_one_width() -> None:
    assert f"embedded engine has {EMBEDDED.dimensions[0]} dimensions and no others" in " ".join(
        PAGE.split()
    )
    assert EMBEDDED.dimensions == (512,)
