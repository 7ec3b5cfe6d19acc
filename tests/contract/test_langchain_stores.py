"""What LangChain's stores keep of our vectors: another process finds the same, other vectors stay
out, and a collection says what its vectors are. The settings are docs/langchain.md's.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from langchain_chroma import Chroma
from langchain_stores import (
    FACTS,
    QUESTIONS,
    SCRIPT,
    STORES,
    every_kind,  # noqa: F401 - a fixture
    hits,
    name_of,
    opened,
    quiet_chroma,
    second_process,
)
from qdrant_client import QdrantClient

from kalm_integrations import KalmModalEmbeddings

pytestmark = quiet_chroma


class TestPersistence:
    def test_another_process_gets_the_same_results(self, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"backend": "local", "query_instruction": "question"}
        embeddings, here = KalmModalEmbeddings(**settings), {}
        for kind in STORES:
            (tmp_path / kind).mkdir()
            with opened(kind, tmp_path / kind, embeddings) as store:
                store.add_texts(FACTS)
                here[kind] = hits(store)
        environment = {f"KALM_{name.upper()}": value for name, value in settings.items()}
        there = second_process(SCRIPT, tmp_path, **environment)
        assert there.keys() == STORES.keys()
        client = embeddings.client
        cosines = client.embed(QUESTIONS, role="query").vectors @ client.embed(FACTS).vectors.T
        for kind, process in ((kind, process) for kind in STORES for process in (here, there)):
            for results, right in zip(process[kind], cosines, strict=True):
                order = np.argsort(-right)[:3]
                assert [text for text, _ in results] == [FACTS[i] for i in order], kind
                assert np.allclose([score for _, score in results], right[order], atol=1e-5), kind
        for kind in STORES:
            scores = [
                [score for results in process[kind] for _, score in results]
                for process in (here, there)
            ]
            assert np.allclose(*scores, atol=1e-6), kind

    def test_the_fingerprint_in_the_name_keeps_other_vectors_out(
        self, kind: str, tmp_path: Path
    ) -> None:
        with opened(kind, tmp_path, KalmModalEmbeddings(backend="local")) as store:
            store.add_texts(FACTS)
        other = KalmModalEmbeddings(backend="local", document_instruction="sts")
        with opened(kind, tmp_path, other) as store:
            assert hits(store) == [[]] * 3
        again = KalmModalEmbeddings(backend="local", query_instruction="web_search", batch_size=1)
        with opened(kind, tmp_path, again) as store:
            assert {len(results) for results in hits(store)} == {3}

    def test_a_collection_stores_the_identity_of_its_vectors(self, tmp_path: Path) -> None:
        embeddings = KalmModalEmbeddings(backend="local")
        for _ in range(2):
            for kind in ("chroma", "qdrant"):
                with opened(kind, tmp_path / kind, embeddings):
                    pass
        name, identity = name_of(embeddings), embeddings.vector_identity.to_dict()
        chroma = chromadb.PersistentClient(str(tmp_path / "chroma"))
        assert json.loads(chroma.get_collection(name).metadata["kalm"]) == identity
        with closing(QdrantClient(path=str(tmp_path / "qdrant"))) as qdrant:
            assert qdrant.get_collection(name).config.metadata == {"kalm": identity}
        with pytest.raises((TypeError, ValueError)):
            Chroma("nested", client=chroma, collection_metadata={"kalm": identity})
