"""`CacheBackedEmbeddings`: the right ways of docs/langchain.md, and the wrong ones failing."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_classic.embeddings import CacheBackedEmbeddings
from langchain_classic.storage import LocalFileStore
from langchain_core.embeddings import Embeddings
from langchain_core.stores import ByteStore, InMemoryByteStore
from scripted import ScriptedTransport, vector_of, vectors_of
from serving import FaultyServer

from kalm_integrations import KalmModalEmbeddings
from kalm_integrations.errors import AuthenticationError
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import EMBEDDED
from kalm_integrations.prompts import RETRIEVAL
from kalm_integrations.protocol import EmbedResponse

TEXT = "How tall is K2?"
AS_DOCUMENT = vectors_of([TEXT])[0].tolist()
AS_QUERY = vectors_of([RETRIEVAL.format(text=TEXT)])[0].tolist()
"""With query_instruction="retrieval"."""

HERE, THERE = (replace(EMBEDDED.space, revision=revision) for revision in ("here", "there"))

Reach = Callable[..., KalmModalEmbeddings]
Cache = Callable[[KalmModalEmbeddings, ByteStore], CacheBackedEmbeddings]


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch) -> Reach:
    """Embeddings of a service that the transport stands in for."""

    def reach(transport: ScriptedTransport, **settings: Any) -> KalmModalEmbeddings:
        monkeypatch.setattr("kalm_integrations.dispatch.open_transport", lambda _: transport)
        defaults = {
            "base_url": "http://there",
            "expected_identity": HERE,
            "dimensions": 512,
            "query_instruction": "retrieval",
            "max_retries": 0,
        }
        return KalmModalEmbeddings(**defaults | settings)

    return reach


def scripted(space: SpaceIdentity = HERE, **options: Any) -> ScriptedTransport:
    return ScriptedTransport(space=space, **options)


def folder_a_role(embeddings: KalmModalEmbeddings, store: ByteStore) -> CacheBackedEmbeddings:
    assert isinstance(store, LocalFileStore)
    return CacheBackedEmbeddings.from_bytes_store(
        embeddings,
        LocalFileStore(store.root_path / embeddings.cache_namespace),
        query_embedding_cache=LocalFileStore(store.root_path / embeddings.query_cache_namespace),
        key_encoder="sha256",
    )


def one_store(embeddings: KalmModalEmbeddings, store: ByteStore) -> CacheBackedEmbeddings:
    def within(namespace: str) -> Any:
        return CacheBackedEmbeddings.from_bytes_store(
            embeddings, store, namespace=namespace, key_encoder="sha256"
        ).document_embedding_store

    return CacheBackedEmbeddings(
        embeddings,
        within(embeddings.cache_namespace),
        query_embedding_store=within(embeddings.query_cache_namespace),
    )


def memory(embeddings: Embeddings, **options: Any) -> CacheBackedEmbeddings:
    """A fresh cache of documents."""
    return CacheBackedEmbeddings.from_bytes_store(
        embeddings, InMemoryByteStore(), key_encoder="sha256", **options
    )


RIGHT: dict[str, tuple[Cache, Callable[[Path], ByteStore]]] = {
    "a folder a role": (folder_a_role, LocalFileStore),
    "one store in memory": (one_store, lambda _: InMemoryByteStore()),
}


@pytest.fixture(params=RIGHT)
def right(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., CacheBackedEmbeddings]:
    """Caches over one and the same store, in the right way."""
    way, storage = RIGHT[request.param]
    store = storage(tmp_path)
    return lambda embeddings: way(embeddings, store)


class TestRoles:
    def test_a_query_never_gets_the_documents_vector(self, reach: Reach, right: Any) -> None:
        transport = scripted()
        cached = right(reach(transport))
        for _ in range(2):
            assert cached.embed_documents([TEXT, "b", TEXT]) == [
                AS_DOCUMENT,
                vectors_of(["b"])[0].tolist(),
                AS_DOCUMENT,
            ]
            assert cached.embed_query(TEXT) == AS_QUERY
        assert transport.sent == [TEXT, "b", RETRIEVAL.format(text=TEXT)]

    def test_a_document_never_gets_the_querys_vector(self, reach: Reach, right: Any) -> None:
        cached = right(reach(scripted()))
        for _ in range(2):
            assert cached.embed_query(TEXT) == AS_QUERY
            assert cached.embed_documents([TEXT]) == [AS_DOCUMENT]

    async def test_async_methods_share_the_cache(self, reach: Reach, right: Any) -> None:
        transport = scripted()
        cached = right(reach(transport))
        for _ in range(2):
            assert await cached.aembed_query(TEXT) == AS_QUERY
            assert await cached.aembed_documents(["b", TEXT]) == [
                vectors_of(["b"])[0].tolist(),
                AS_DOCUMENT,
            ]
        assert cached.embed_query(TEXT) == AS_QUERY
        assert cached.embed_documents([TEXT]) == [AS_DOCUMENT]
        assert transport.sent == [RETRIEVAL.format(text=TEXT), "b", TEXT]


def widened(answer: EmbedResponse) -> EmbedResponse:
    """Twice the dimensions, unit length again."""
    wide = np.tile(answer.vectors.astype(np.float32), 2) / np.sqrt(2)
    return replace(answer, vectors=wide.astype(answer.vectors.dtype))


class TestNamespaces:
    @pytest.mark.parametrize(
        "change",
        [
            {"expected_identity": THERE},
            {"dimensions": 1024},
            {"document_instruction": "Given a ticket, find its solution"},
            {"query_instruction": "sts"},  # symmetric: documents are instructed too
            {"truncate": "end"},
        ],
        ids=" ".join,
    )
    def test_arguments_that_change_document_vectors_embed_again(
        self, reach: Reach, right: Any, change: dict[str, Any]
    ) -> None:
        old = right(reach(scripted())).embed_documents([TEXT])
        transport = scripted(
            change.get("expected_identity", HERE),
            faults=[widened] if "dimensions" in change else [],
        )
        cached = right(reach(transport, **change))
        (vector,) = cached.embed_documents([TEXT])
        assert len(transport.sent) == 1
        assert len(vector) == change.get("dimensions", 512)
        assert cached.embed_documents([TEXT]) == [vector]
        assert len(transport.sent) == 1
        unasked = scripted()
        assert right(reach(unasked)).embed_documents([TEXT]) == old
        assert unasked.requests == []

    @pytest.mark.parametrize(
        "change",
        [
            {"batch_size": 7},
            {"max_concurrency": 3},
            {"timeout": 5},
            {"api_key": "hunter2"},
            {"base_url": "https://elsewhere/v1"},
            {"vector_dtype": "float32"},
            {"show_progress": True},
        ],
        ids=" ".join,
    )
    def test_other_arguments_use_the_cache(
        self, reach: Reach, right: Any, change: dict[str, Any]
    ) -> None:
        cached = right(reach(scripted()))
        old = cached.embed_documents([TEXT]), cached.embed_query(TEXT)
        transport = scripted()
        cached = right(reach(transport, **change))
        assert (cached.embed_documents([TEXT]), cached.embed_query(TEXT)) == old
        assert transport.requests == []

    @pytest.mark.parametrize(
        ("change", "embedded_again"),
        [
            ({"query_instruction": "web_search"}, True),
            ({"expected_identity": THERE}, True),
            ({"document_instruction": "Given a ticket, find its solution"}, False),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )
    def test_queries_have_their_own_namespace(
        self, reach: Reach, right: Any, change: dict[str, Any], embedded_again: bool
    ) -> None:
        right(reach(scripted())).embed_query(TEXT)
        transport = scripted(change.get("expected_identity", HERE))
        right(reach(transport, **change)).embed_query(TEXT)
        assert len(transport.sent) == embedded_again

    def test_a_new_query_instruction_keeps_the_documents(self, reach: Reach, right: Any) -> None:
        right(reach(scripted())).embed_documents([TEXT])
        transport = scripted()
        cached = right(reach(transport, query_instruction="web_search"))
        assert cached.embed_documents([TEXT]) == [AS_DOCUMENT]
        assert transport.requests == []


class TestStoring:
    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_finished_batches_survive(self, reach: Reach, asynchronous: bool) -> None:
        transport = scripted(faults=[None, None, AuthenticationError("no")])
        cached = memory(reach(transport), batch_size=2)
        texts = list("abcdefgh")

        def embed() -> list[list[float]]:
            if asynchronous:
                return asyncio.run(cached.aembed_documents(texts))
            return cached.embed_documents(texts)

        with pytest.raises(AuthenticationError):
            embed()
        assert transport.sent == list("abcdef")
        assert np.array_equal(embed(), vectors_of(texts))
        assert transport.sent == list("abcdef") + list("efgh")

    def test_a_batch_is_sent_as_concurrent_requests(self, reach: Reach) -> None:
        transport = scripted(delay=lambda _: 0.02)
        cached = memory(reach(transport, batch_size=2, max_concurrency=3), batch_size=6)
        texts = [f"text {i}" for i in range(18)]
        assert np.array_equal(cached.embed_documents(texts), vectors_of(texts))
        assert [len(request.texts) for request in transport.requests] == [2] * 9
        assert transport.most_in_flight == 3


SECOND_PROCESS = """
import json, sys
from langchain_classic.embeddings import CacheBackedEmbeddings
from langchain_classic.storage import LocalFileStore
from kalm_integrations import KalmModalEmbeddings

folder, texts = sys.argv[1], sys.argv[2:]
embeddings = KalmModalEmbeddings()
cached = CacheBackedEmbeddings.from_bytes_store(
    embeddings,
    LocalFileStore(f"{folder}/{embeddings.cache_namespace}"),
    query_embedding_cache=LocalFileStore(f"{folder}/{embeddings.query_cache_namespace}"),
    key_encoder="sha256",
)
print(json.dumps([cached.embed_documents(texts), cached.embed_query(texts[0])]))
"""


def test_another_process_reads_the_cache_without_a_service(tmp_path: Path) -> None:
    texts = ["猫が好き", "Bread rises.", TEXT]
    settings = {"model": EMBEDDED.space.model, "query_instruction": "retrieval"}

    def second_process(url: str, *texts: str) -> Any:
        environment = {f"KALM_{name.upper()}": value for name, value in settings.items()}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", SECOND_PROCESS, tmp_path, *texts],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | environment | {"KALM_BASE_URL": url},
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return json.loads(done.stdout)

    with FaultyServer() as server:
        embeddings = KalmModalEmbeddings(base_url=server.url, **settings)
        with embeddings:
            cached = folder_a_role(embeddings, LocalFileStore(tmp_path))
            first = [cached.embed_documents(texts), cached.embed_query(texts[0])]
        assert np.array_equal(first[0], vectors_of(texts))
        assert np.array_equal(first[1], vector_of(RETRIEVAL.format(text=texts[0])))
        before = len(server.received)
        assert second_process(server.url, *texts) == first
        assert len(server.received) == before
        second_process(server.url, *texts, "one more")
        assert [request.texts for request in server.posted[2:]] == [["one more"]]
    assert len(list(tmp_path.rglob("*"))) == 2 + 4 + 1  # folders, documents, query
