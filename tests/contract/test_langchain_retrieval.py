"""Retrieval with the LangChain class: every store's retriever, 50 questions at once in a loop and
in threads, one object on 16 threads, and copies in another process or beside the first.
"""

from __future__ import annotations

import asyncio
import copy
import pickle
import random
import threading
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_stores import (
    ANSWERS,
    FACTS,
    QUESTIONS,
    SECRETS,
    every_kind,  # noqa: F401 - a fixture
    hits,
    opened,
    quiet_chroma,
    second_process,
    secrets_in,
)
from scripted import ScriptedTransport, vectors_of

from kalm_integrations import KalmModalEmbeddings
from kalm_integrations.protocol import EmbedRequest, EmbedResponse

pytestmark = quiet_chroma


class TestRetrieval:
    @pytest.mark.parametrize(
        ("search_type", "options"),
        [("similarity", {"k": 1}), ("mmr", {"k": 2, "fetch_k": 5})],
        ids=["similarity", "mmr"],
    )
    async def test_as_retriever(
        self, kind: str, tmp_path: Path, search_type: str, options: dict[str, Any]
    ) -> None:
        embeddings = KalmModalEmbeddings(backend="local")
        with opened(kind, tmp_path, embeddings) as store:
            await store.aadd_texts(FACTS)
            retriever = store.as_retriever(search_type=search_type, search_kwargs=options)
            results = [retriever.invoke(question)[0].page_content for question in QUESTIONS]
            assert results == ANSWERS
            results = [(await retriever.ainvoke(q))[0].page_content for q in QUESTIONS]
            assert results == ANSWERS
            batched = await retriever.abatch(QUESTIONS)
            assert [documents[0].page_content for documents in batched] == ANSWERS

    @pytest.mark.parametrize(
        ("kind", "relevance"),
        [
            ("chroma", lambda cosine: cosine),
            ("qdrant", lambda cosine: (1 + cosine) / 2),
            ("faiss", lambda cosine: (1 + cosine) / 2),
        ],
        ids=["chroma", "qdrant", "faiss"],
    )
    async def test_a_threshold_keeps_similar_documents(
        self, kind: str, relevance: Callable[[float], float], tmp_path: Path
    ) -> None:
        with opened(kind, tmp_path, KalmModalEmbeddings(backend="local")) as store:
            store.add_texts(FACTS[:3])
            (near, far, *_), *_ = hits(store)
            scored = store.similarity_search_with_relevance_scores(QUESTIONS[0], k=2)
            expected = [relevance(near[1]), relevance(far[1])]
            assert [score for _, score in scored] == pytest.approx(expected, abs=1e-6)
            retriever = store.as_retriever(
                search_type="similarity_score_threshold",
                search_kwargs={"k": 3, "score_threshold": sum(expected) / 2},
            )
            for documents in (
                retriever.invoke(QUESTIONS[0]),
                await retriever.ainvoke(QUESTIONS[0]),
            ):
                assert [document.page_content for document in documents] == ANSWERS[:1]


QUERIES = [f"question {i}" for i in range(50)]


def fan_out(store: VectorStore) -> Runnable[list[str], dict[str, list[Document]]]:
    """Retrieves for each of 50 questions at once."""
    retriever = store.as_retriever(search_kwargs={"k": 1})
    return RunnableParallel(
        {str(i): RunnableLambda(itemgetter(i)) | retriever for i in range(len(QUERIES))}
    )


def each_its_own(answers: dict[str, list[Document]]) -> bool:
    results = {name: documents[0].page_content for name, documents in answers.items()}
    return results == {str(i): query for i, query in enumerate(QUERIES)}


class Patient(ScriptedTransport):
    """Answers no query before as many as `at_once` were asked, nor before the loop that waits for
    the answer has turned once more: what blocks the loop runs into the client's `timeout`, once."""

    def __init__(self, at_once: int) -> None:
        super().__init__(delay=lambda _: random.uniform(0, 0.01))
        self.at_once = at_once
        self.iterations = self.held = self.most_held = 0
        self.gave_up = False

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        if request.role == "document":
            return await super().embed(request)
        iterations = self.iterations
        self.held += 1
        self.most_held = max(self.most_held, self.held)
        try:
            while not self.gave_up and (
                self.most_held < self.at_once or self.iterations == iterations
            ):
                await asyncio.sleep(0.001)
            return await super().embed(request)
        except asyncio.CancelledError:
            self.gave_up = True
            raise
        finally:
            self.held -= 1

    async def count_turns(self) -> None:
        while True:
            await asyncio.sleep(0.001)
            self.iterations += 1


class TestParallel:
    async def test_50_queries_in_one_loop(self, over: Any, kind: str, tmp_path: Path) -> None:
        on_the_loop = kind in ("faiss", "in memory")  # the others: a worker thread each
        transport = Patient(at_once=8 if on_the_loop else 2)
        embeddings = over(transport, KalmModalEmbeddings, max_concurrency=8, timeout=15)
        turning = asyncio.create_task(transport.count_turns())
        with opened(kind, tmp_path, embeddings) as store:
            await store.aadd_texts(random.sample(QUERIES, len(QUERIES)))
            assert each_its_own(await fan_out(store).ainvoke(QUERIES))
        turning.cancel()
        assert [len(request.texts) for request in transport.requests[1:]] == [1] * 50
        assert transport.at_once <= transport.most_held <= 8

    async def test_more_queries_than_the_loop_has_threads(self, over: Any, tmp_path: Path) -> None:
        transport = Patient(at_once=40)
        embeddings = over(transport, KalmModalEmbeddings, max_concurrency=40, timeout=15)
        turning = asyncio.create_task(transport.count_turns())
        with opened("qdrant", tmp_path, embeddings) as store:
            store.add_texts(QUERIES)

            async def ask(query: str) -> str:
                vector = await embeddings.aembed_query(query)
                return store.similarity_search_by_vector(vector, k=1)[0].page_content

            assert await asyncio.gather(*map(ask, QUERIES)) == QUERIES
        turning.cancel()
        assert transport.most_held == 40


class TestThreads:
    def test_16_threads_share_one_object(self, over: Any) -> None:
        transport = ScriptedTransport(delay=lambda _: random.uniform(0, 0.01))
        embeddings = over(transport, KalmModalEmbeddings, batch_size=3, max_concurrency=4)
        everyone = threading.Barrier(16)
        wrong: list[object] = []

        def work(number: int) -> None:
            texts = [f"text {i}" for i in range(number, number + 8)]  # some are others' too
            everyone.wait()
            try:
                for turn in range(5):
                    if (number + turn) % 2:
                        documents = embeddings.embed_documents(texts)
                        query = embeddings.embed_query(texts[turn])
                    else:
                        documents = asyncio.run(embeddings.aembed_documents(texts))
                        query = asyncio.run(embeddings.aembed_query(texts[turn]))
                    if not np.array_equal(documents, vectors_of(texts)):
                        wrong.append((number, turn, "documents"))
                    if not np.array_equal(query, vectors_of([texts[turn]])[0]):
                        wrong.append((number, turn, "query"))
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert transport.most_in_flight <= 8  # documents' slots and queries'
        assert transport.closed == 0


class TestCopies:
    def test_a_pickled_retriever_works_in_another_process(self, tmp_path: Path) -> None:
        embeddings = KalmModalEmbeddings(backend="local", **SECRETS)
        store = InMemoryVectorStore(embeddings)
        store.add_texts(FACTS)
        pickled = pickle.dumps(store.as_retriever(search_kwargs={"k": 1}))
        assert secrets_in(pickled.decode("latin-1")) == []
        (tmp_path / "retriever").write_bytes(pickled)
        code = (
            "import json, pathlib, pickle, sys\n"
            "path, *questions = sys.argv[1:]\n"
            "retriever = pickle.loads(pathlib.Path(path).read_bytes())\n"
            "results = [retriever.invoke(question)[0].page_content for question in questions]\n"
            "print(json.dumps(results))"
        )
        assert second_process("-c", code, tmp_path / "retriever", *QUESTIONS) == ANSWERS

    @pytest.mark.parametrize("used", [False, True])
    def test_a_deep_copy_of_a_store_is_independent(
        self, monkeypatch: pytest.MonkeyPatch, used: bool
    ) -> None:
        sessions: list[ScriptedTransport] = []

        def connect(_: object) -> ScriptedTransport:
            sessions.append(ScriptedTransport())
            return sessions[-1]

        monkeypatch.setattr("kalm_integrations.dispatch.open_transport", connect)
        store = InMemoryVectorStore(KalmModalEmbeddings(backend="local", **SECRETS))
        if used:
            store.add_texts(FACTS[:2])
        twin = copy.deepcopy(store.as_retriever()).vectorstore
        assert isinstance(twin, InMemoryVectorStore)
        assert twin.embedding == store.embedding
        for number, each in enumerate((twin, store), start=2):
            each.add_texts(FACTS[number : number + 1])
            results = each.similarity_search(FACTS[number], k=1)
            assert results[0].page_content == FACTS[number]
        assert len(store.store) == len(twin.store) == 1 + 2 * used
        assert len(sessions) == 2
        twin.embedding.close()
        store.similarity_search("x")
        assert sorted(session.closed for session in sessions) == [0, 1]
