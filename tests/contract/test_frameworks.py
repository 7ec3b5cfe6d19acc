"""Haystack, Chroma and LanceDB, the real packages: roles, storage without secrets, identity."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import chromadb
import lancedb
import numpy as np
import pytest
from chromadb.config import Settings
from lancedb.embeddings import get_registry
from lancedb.pydantic import LanceModel, Vector
from scripted import ScriptedTransport, vector_of, vectors_of

from kalm_integrations import KalmClient, prompts
from kalm_integrations.chroma import KalmEmbeddingFunction
from kalm_integrations.errors import ConfigurationError, IdentityMismatchError, InvalidInputError

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # read when it is imported

from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.utils import Secret

from kalm_integrations.haystack import KalmDocumentEmbedder, KalmTextEmbedder

KEY = "correct-horse-battery"
TEXTS = ["K2 is 8,611 metres high.", "Bread rises because yeast gives off gas."]
HTTP: dict[str, Any] = {"base_url": "http://127.0.0.1:9", "model": "a/model"}
PREFIX = "Instruct: a task\nQuery:"


@pytest.fixture
def client() -> KalmClient:
    return KalmClient(
        transport=ScriptedTransport(),
        model="universal-sentence-encoder-multilingual-3",
        query_instruction="a task",
    )


class TestHaystack:
    def test_documents_and_queries_in_a_pipeline(self, client: KalmClient) -> None:
        documents = [Document(content=text, meta={"n": n}) for n, text in enumerate(TEXTS)]
        filled = KalmDocumentEmbedder(client=client).run(documents)["documents"]
        assert [document.meta["n"] for document in filled] == [0, 1]
        assert np.array_equal([document.embedding for document in filled], vectors_of(TEXTS))
        assert documents[0].embedding is None
        store = InMemoryDocumentStore()
        store.write_documents(filled)
        pipeline = Pipeline()
        pipeline.add_component("embedder", KalmTextEmbedder(client=client))
        pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
        pipeline.connect("embedder.embedding", "retriever.query_embedding")
        found = pipeline.run({"embedder": {"text": TEXTS[1]}})
        assert len(found["retriever"]["documents"]) == 1

    def test_a_query_has_its_instruction_and_async_is_the_same(self, client: KalmClient) -> None:
        embedder = KalmTextEmbedder(client=client)
        expected = vector_of(PREFIX + TEXTS[0], "float32").astype("float16").tolist()
        assert embedder.run(TEXTS[0])["embedding"] == expected
        assert asyncio.run(embedder.run_async(TEXTS[0])) == embedder.run(TEXTS[0])
        documents = [Document(content=text) for text in TEXTS]
        embedder_of_documents = KalmDocumentEmbedder(client=client)
        assert asyncio.run(embedder_of_documents.run_async(documents)) == (
            embedder_of_documents.run(documents)
        )

    def test_a_document_without_text_is_named(self, client: KalmClient) -> None:
        with pytest.raises(InvalidInputError) as failure:
            KalmDocumentEmbedder(client=client).run([Document(content="a"), Document(content=None)])
        assert [each.index for each in failure.value.invalid] == [1]

    def test_a_secret_is_stored_as_the_name_of_its_variable(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MY_KEY", KEY)
        embedder = KalmTextEmbedder(**HTTP, api_key=Secret.from_env_var("MY_KEY"))
        pipeline = Pipeline()
        pipeline.add_component("embedder", embedder)
        stored = pipeline.dumps()
        assert "MY_KEY" in stored
        assert KEY not in stored
        allowed = ["kalm_integrations.haystack"]
        again = Pipeline.loads(stored, allowed_modules=allowed).get_component("embedder")
        config = again.client.config
        assert config.api_key.get_secret_value() == KEY
        assert (config.base_url, config.model) == (HTTP["base_url"], HTTP["model"])
        assert again.to_dict() == embedder.to_dict()

    def test_a_literal_secret_is_not_stored(self) -> None:
        embedder = KalmDocumentEmbedder(**HTTP, api_key=Secret.from_token(KEY))
        with pytest.raises(ValueError, match="Cannot serialize"):
            embedder.to_dict()

    def test_a_secret_may_be_none_and_a_literal_one_is_refused(self) -> None:
        stored = KalmTextEmbedder(**HTTP, api_key=None).to_dict()
        stored["init_parameters"]["api_key"] = None
        assert KalmTextEmbedder.from_dict(stored).client.config.api_key is None
        with pytest.raises(TypeError, match=r"api_key.*from_env_var") as caught:
            KalmTextEmbedder(**HTTP, api_key="literal-key")
        assert "literal-key" not in str(caught.value)

    def test_a_stored_embedder_refuses_to_make_other_vectors(self) -> None:
        stored = KalmDocumentEmbedder(**HTTP).to_dict()
        stored["init_parameters"]["identity"]["dimensions"] = 7
        with pytest.raises(IdentityMismatchError):
            KalmDocumentEmbedder.from_dict(stored)

    def test_a_client_excludes_its_arguments(self, client: KalmClient) -> None:
        with pytest.raises(ConfigurationError, match="contradict"):
            KalmTextEmbedder(client=client, dimensions=512)


class TestChroma:
    def test_roles_and_what_a_collection_stores(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KALM_BACKEND", "local")
        store = chromadb.PersistentClient(tmp_path, Settings(anonymized_telemetry=False))
        ours = KalmEmbeddingFunction(query_instruction="a task", api_key=KEY)
        made = store.create_collection("facts", embedding_function=ours)
        made.add(ids=["a", "b"], documents=TEXTS)
        assert made.configuration["hnsw"]["space"] == "cosine"
        reopened = store.get_collection("facts")  # Chroma builds the function from what it stored
        stored = reopened.configuration["embedding_function"].get_config()
        assert stored["query_instruction"] == "a task"
        assert KEY not in json.dumps(stored)
        assert KEY.encode() not in (tmp_path / "chroma.sqlite3").read_bytes()
        found = reopened.query(query_texts=[TEXTS[0]], n_results=1, include=["distances"])
        query = KalmClient(backend="local", query_instruction="a task").embed(
            [TEXTS[0]], role="query"
        )
        document = ours.client.embed([TEXTS[0]])
        assert found["distances"] is not None
        expected = 1 - float(query.vectors[0] @ document.vectors[0])
        assert found["distances"][0][0] == pytest.approx(expected, abs=1e-3)

    def test_a_collection_refuses_other_vectors(self) -> None:
        config = KalmEmbeddingFunction(**HTTP).get_config()
        other = KalmEmbeddingFunction(**HTTP, document_instruction="sts")
        with pytest.raises(IdentityMismatchError):
            other.validate_config_update(config, other.get_config())
        other.validate_config_update(other.get_config(), other.get_config())
        config["identity"]["dimensions"] = 7
        with pytest.raises(IdentityMismatchError):
            KalmEmbeddingFunction.build_from_config(config)


class TestLanceDB:
    def test_roles_and_what_a_table_stores(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KALM_BACKEND", "local")
        import kalm_integrations.lancedb

        get_registry().set_var("kalm_key", KEY)
        kalm = (
            get_registry().get("kalm").create(query_instruction="a task", api_key="$var:kalm_key")
        )
        assert isinstance(kalm, kalm_integrations.lancedb.KalmEmbeddingFunction)
        assert kalm._client.config.api_key.get_secret_value() == KEY

        class Fact(LanceModel):
            text: str = kalm.SourceField()
            vector: Vector(kalm.ndims()) = kalm.VectorField()  # type: ignore[valid-type]

        database = lancedb.connect(tmp_path)
        table = database.create_table("facts", schema=Fact)
        table.add([{"text": text} for text in TEXTS])
        stored = table.schema.metadata[b"embedding_functions"]
        assert KEY.encode() not in stored
        assert b"$var:kalm_key" in stored
        reopened = database.open_table("facts")  # LanceDB builds the function from what it stored
        (found,) = reopened.search(TEXTS[0]).distance_type("dot").limit(1).to_list()
        document = kalm._client.embed([TEXTS[0]]).vectors[0]
        assert np.allclose(found["vector"], document, atol=1e-6)
        query = kalm._client.embed([TEXTS[0]], role="query").vectors[0]
        assert found["_distance"] == pytest.approx(1 - float(query @ document), abs=1e-3)

    def test_a_literal_key_and_other_vectors_are_refused(self) -> None:
        import kalm_integrations.lancedb  # noqa: F401

        function = get_registry().get("kalm")
        with pytest.raises(ValueError, match="api_key"):
            function.create(**HTTP, api_key=KEY)
        stored = function.create(**HTTP).safe_model_dump()
        stored["identity"]["dimensions"] = 7
        with pytest.raises(IdentityMismatchError):
            function.create(**stored)


def test_the_prefix_is_the_instruction() -> None:
    assert prompts.resolve("a task") == PREFIX + "{text}"
