"""docs/hybrid-search.md: its table is what LanceDB finds, and its example needs the words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import lancedb
import numpy as np
import pytest
from lancedb.index import FTS
from lancedb.rerankers import RRFReranker

from kalm_integrations import KalmClient

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/hybrid-search.md").read_text()
SEARCHES = ("vectors", "BM25", "hybrid")


def test_the_table_is_what_lancedb_finds(tmp_path: Path) -> None:
    lines = (ROOT / "examples/retrieval_set.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    client = KalmClient(backend="local")
    passages = [row["passage"] for row in rows]
    vectors = client.embed(passages).vectors
    data = [{"id": i, "text": text, "vector": vectors[i]} for i, text in enumerate(passages)]
    table = lancedb.connect(tmp_path).create_table("passages", data)
    table.create_index("text", config=FTS(language="English"))

    ranks = np.full((len(SEARCHES), len(rows)), 10)
    queries = client.embed([row["question"] for row in rows], role="query").vectors
    for i, (row, query) in enumerate(zip(rows, queries, strict=True)):
        both = table.search(query_type="hybrid").vector(query).text(row["question"])
        words = table.search(row["question"], query_type="fts")
        for j, search in enumerate((table.search(query), words, both.rerank(RRFReranker()))):
            ids = [hit["id"] for hit in search.limit(10).to_list()]
            if i in ids:
                ranks[j, i] = ids.index(i)

    same = np.array([row["language"] == row["question_language"] for row in rows])
    figures = re.findall(r"\| recall@(\d+) \| (.+) \| (.+) \| (.+) \|", PAGE)
    for (k, *documented), of in zip(figures, (same, same, ~same, ~same), strict=True):
        measured = (ranks[:, of] < int(k)).mean(axis=1)
        assert [float(figure) for figure in documented] == pytest.approx(measured, abs=0.05)
    assert f"| {same.sum()}, in the passage's language" in PAGE
    assert f"| {(~same).sum()}, in another language" in PAGE


def test_vectors_alone_find_the_wrong_ticket() -> None:
    texts = re.findall(r'\{"text": "(.+)"\}', PAGE)
    (question,) = set(re.findall(r'question = "(.+)"', PAGE))
    client = KalmClient(backend="local")
    scores = client.embed(texts).vectors @ client.embed([question], role="query").vectors[0]
    assert "4714" in question
    assert "4713" in texts[int(scores.argmax())]
