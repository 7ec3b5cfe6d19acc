"""The LangChain class, with the real langchain-core, its standard tests and a real store."""

from __future__ import annotations

import asyncio
import copy
import pickle
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from langchain_core import exceptions
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_qdrant import QdrantVectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from scripted import ScriptedTransport, vectors_of

from kalm_integrations import KalmClient, KalmModalEmbeddings, errors, langchain_errors
from kalm_integrations.errors import IdentityMismatchError, InvalidInputError, InvalidText
from kalm_integrations.models import EMBEDDED
from kalm_integrations.prompts import RETRIEVAL

FACTS = [
    "K2 is 8,611 metres high.",
    "The Nile flows through eleven countries.",
    "Bread rises because yeast gives off gas.",
]


class TestStandardUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return KalmModalEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"backend": "local"}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        environment = {"KALM_BACKEND": "local", "KALM_TRUNCATE": "end"}
        namespace = KalmClient(backend="local", truncate="end").cache_namespace
        return environment, {}, {"vector_dimensions": 512, "cache_namespace": namespace}


class TestStandardIntegration(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return KalmModalEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"backend": "local"}


class TestVectors:
    def test_all_four_methods_give_the_clients_vectors_as_plain_lists(self) -> None:
        embeddings = KalmModalEmbeddings(backend="local")
        expected = KalmClient(backend="local").embed(FACTS).vectors
        documents = embeddings.embed_documents(FACTS)
        assert {type(documents), type(documents[0])} == {list}
        assert {type(number) for vector in documents for number in vector} == {float}
        asynchronous = asyncio.run(embeddings.aembed_documents(FACTS))
        query = embeddings.embed_query(FACTS[0])
        aquery = asyncio.run(embeddings.aembed_query(FACTS[0]))
        for got in (documents, asynchronous):
            assert np.allclose(got, expected, atol=1e-3)
        for got in (query, aquery):
            assert np.allclose(got, expected[0], atol=1e-3)

    def test_queries_are_instructed_and_documents_are_not(self, over: Any) -> None:
        transport = ScriptedTransport()
        embeddings = over(transport, KalmModalEmbeddings, query_instruction="retrieval")
        assert embeddings.embed_query("q") == vectors_of([RETRIEVAL.format(text="q")])[0].tolist()
        asyncio.run(embeddings.aembed_query("q2"))
        embeddings.embed_documents(["d"])
        asyncio.run(embeddings.aembed_documents(["d2"]))
        card = "Instruct: Given a query, retrieve documents that answer the query \nQuery: "
        assert transport.sent == [card + "q", card + "q2", "d", "d2"]
        roles = [request.role for request in transport.requests]
        assert roles == ["query", "query", "document", "document"]

    async def test_async_does_not_block_the_loop(self, over: Any) -> None:
        embeddings = over(ScriptedTransport(delay=lambda _: 0.2), KalmModalEmbeddings)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticking = asyncio.create_task(tick())
        await asyncio.gather(*(embeddings.aembed_query(f"q{i}") for i in range(10)))
        ticking.cancel()
        assert ticks > 10


class TestStores:
    def test_in_memory_store(self) -> None:
        store = InMemoryVectorStore(KalmModalEmbeddings(backend="local"))
        store.add_texts(FACTS)
        assert store.similarity_search("How tall is the mountain?", k=1)[0].page_content == FACTS[0]

    async def test_qdrant_sync_async_and_as_retriever(self) -> None:
        store = QdrantVectorStore.from_texts(
            FACTS, KalmModalEmbeddings(backend="local"), location=":memory:"
        )
        retriever = store.as_retriever(search_kwargs={"k": 1})
        # Across languages: the question is German, the documents are English.
        assert retriever.invoke("Warum geht Brot auf?")[0].page_content == FACTS[2]
        assert (await retriever.ainvoke("Which river?"))[0].page_content == FACTS[1]

    def test_an_invalid_text_leaves_the_store_unchanged(self) -> None:
        store = InMemoryVectorStore(KalmModalEmbeddings(backend="local", batch_size=1))
        with pytest.raises(InvalidInputError, match=r"texts\[1\] is empty"):
            store.add_documents([Document("a"), Document(""), Document("b")])
        assert store.store == {}

    def test_a_wrong_service_leaves_the_store_unchanged(self, over: Any) -> None:
        store = InMemoryVectorStore(
            over(
                ScriptedTransport(space=replace(EMBEDDED.space, revision="x")), KalmModalEmbeddings
            )
        )
        with pytest.raises(IdentityMismatchError):
            store.add_texts(FACTS)
        assert store.store == {}


class TestErrors:
    """Ours are LangChain's provider-neutral ones too, and carry all that they carried."""

    CASES: ClassVar = {
        errors.InputTooLongError.of([InvalidText(0, "is too long")]): "ContextOverflowError",
        errors.InvalidInputError.of([InvalidText(0, "is bad")]): "ModelInvalidRequestError",
        errors.ConfigurationError("no"): "ModelInvalidRequestError",
        errors.AuthenticationError("no"): "ModelAuthenticationError",
        errors.PermissionDeniedError("no"): "ModelPermissionDeniedError",
        errors.NotFoundError("no"): "ModelNotFoundError",
        errors.RateLimitError("no", 3.0): "ModelRateLimitError",
        errors.ConnectionFailedError("no"): "ModelConnectionError",
        errors.ServiceUnavailableError("no"): "ModelAPIError",
        errors.DeadlineExceededError("no"): "ModelTimeoutError",
        errors.IdentityMismatchError("no"): "ModelError",
    }

    @pytest.mark.parametrize("asynchronous", [False, True])
    @pytest.mark.parametrize("raised", CASES, ids=lambda error: type(error).__name__)
    def test_both(self, over: Any, raised: errors.KalmError, asynchronous: bool) -> None:
        transport = ScriptedTransport([None, raised])
        embeddings = over(
            transport, KalmModalEmbeddings, batch_size=1, max_concurrency=1, max_retries=0
        )
        with pytest.raises(type(raised)) as caught:
            if asynchronous:
                asyncio.run(embeddings.aembed_documents(["first", "second"]))
            else:
                embeddings.embed_documents(["first", "second"])
        error = caught.value
        theirs = getattr(exceptions, self.CASES[raised])
        assert isinstance(error, theirs)
        assert type(error).__name__ == type(raised).__name__
        assert error.is_retryable == theirs.is_retryable
        assert error.partial.indices.tolist() == [0]
        twin = pickle.loads(pickle.dumps(error))
        assert (type(twin), str(twin)) == (type(error), str(error))
        if isinstance(error, errors.InvalidInputError):
            assert [bad.index for bad in error.invalid] == [1]
        if isinstance(error, errors.RateLimitError):
            assert error.retry_after == 3.0

    def test_every_class_of_ours_has_one_of_theirs(self) -> None:
        for ours, both in langchain_errors._BOTH.items():
            assert issubclass(both, ours)
            assert issubclass(both, exceptions.ModelError)


class TestObject:
    def test_it_holds_a_client_and_shares_it(self) -> None:
        embeddings = KalmModalEmbeddings(backend="local")
        assert isinstance(embeddings.client, KalmClient)
        assert KalmModalEmbeddings(client=embeddings.client).client is embeddings.client
        with pytest.raises(errors.ConfigurationError, match=r"client= and batch_size="):
            KalmModalEmbeddings(client=embeddings.client, batch_size=3)
        parts = list(embeddings.iter_embed(["a", "", "b"], on_error="skip"))
        assert [bad.index for part in parts for bad in part.rejected] == [1]
        assert embeddings.warm_up().dimensions == 512
        assert embeddings.cache_namespace == KalmClient(backend="local").cache_namespace

    @pytest.mark.parametrize("used", [False, True])
    def test_copies_and_pickles_work(self, used: bool) -> None:
        embeddings = KalmModalEmbeddings(backend="local", batch_size=7)
        if used:
            embeddings.embed_query("x")
        pickled = pickle.loads(pickle.dumps(embeddings))
        for twin in (pickled, copy.copy(embeddings), copy.deepcopy(embeddings)):
            assert twin == embeddings
            assert hash(twin) == hash(embeddings)
            assert twin.client.config.batch_size == 7
            assert twin.embed_query("x") == embeddings.embed_query("x")

    def test_a_pickle_has_no_secret_and_reads_the_environment_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        embeddings = KalmModalEmbeddings(base_url="http://there", api_key="hunter2", batch_size=7)
        pickled = pickle.dumps(embeddings)
        assert b"hunter2" not in pickled
        assert copy.deepcopy(embeddings).client.config.api_key == embeddings.client.config.api_key
        assert pickle.loads(pickled).client.config.api_key is None
        monkeypatch.setenv("KALM_API_KEY", "hunter3")
        twin = pickle.loads(pickled).client.config
        assert (twin.api_key.get_secret_value(), twin.batch_size) == ("hunter3", 7)

    def test_arguments_cannot_be_changed(self) -> None:
        with pytest.raises(AttributeError, match="batch_size is fixed: use with_options"):
            KalmModalEmbeddings(backend="local").batch_size = 3  # type: ignore[misc]
