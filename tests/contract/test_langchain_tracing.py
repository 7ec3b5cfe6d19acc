"""What callbacks, tracers and LangSmith are told of a retrieval with the LangChain class: whole
runs, errors as they are, no secret; and `on_usage` in the context of who asked.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumpd
from langchain_core.runnables import (
    Runnable,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
)
from langchain_core.tracers.context import collect_runs
from langchain_core.tracers.langchain import LangChainTracer
from langchain_core.vectorstores import VectorStore
from langchain_stores import (
    ANSWERS,
    FACTS,
    QUESTIONS,
    SECRETS,
    every_kind,  # noqa: F401 - a fixture
    opened,
    quiet_chroma,
    secrets_in,
)
from langsmith import Client
from scripted import ScriptedTransport
from serving import FaultyServer, reply

from kalm_integrations import KalmModalEmbeddings
from kalm_integrations.errors import AuthenticationError, KalmError
from kalm_integrations.models import EMBEDDED
from kalm_integrations.result import Usage

pytestmark = quiet_chroma

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


class Seen(BaseCallbackHandler):
    """What a tracer is told of retrievals: the event, its run and the run's parent."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any, Any]] = []
        self.chains: dict[Any, Any] = {}
        self.payloads: list[Any] = []
        self.errors: list[BaseException] = []

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: Any, **more: Any) -> None:
        self.chains[run_id] = more["parent_run_id"]
        self.payloads.append([serialized, inputs, more])

    def on_retriever_start(self, serialized: Any, query: str, *, run_id: Any, **more: Any) -> None:
        self.events.append(("start", run_id, more["parent_run_id"]))
        self.payloads.append([serialized, query, more])

    def on_retriever_end(self, documents: Any, *, run_id: Any, **more: Any) -> None:
        self.events.append(("end", run_id, more["parent_run_id"]))
        self.payloads.append([documents, more])

    def on_retriever_error(self, error: BaseException, *, run_id: Any, **more: Any) -> None:
        self.events.append(("error", run_id, more["parent_run_id"]))
        self.payloads.append([error, more])
        self.errors.append(error)


def chain_over(store: VectorStore) -> Runnable[str, str]:
    retriever = store.as_retriever(search_kwargs={"k": 1})
    retrieval: Runnable[str, dict[str, Any]] = RunnableParallel(
        documents=retriever, question=RunnablePassthrough()
    )
    return retrieval | RunnableLambda(lambda step: step["documents"][0].page_content)


def way_of(chain: Runnable[Any, Any], asynchronous: bool) -> Callable[..., Any]:
    if not asynchronous:
        return chain.invoke
    return lambda *arguments, **options: asyncio.run(chain.ainvoke(*arguments, **options))


@contextmanager
def running(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
class TestTracing:
    def test_callbacks_see_each_retrieval_under_its_chain(
        self, kind: str, tmp_path: Path, asynchronous: bool
    ) -> None:
        embeddings = KalmModalEmbeddings(backend="local", **SECRETS)
        seen = Seen()
        with opened(kind, tmp_path, embeddings) as store:
            store.add_texts(FACTS)
            ask = way_of(chain_over(store), asynchronous)
            with collect_runs() as collected:
                assert ask(QUESTIONS[0], {"callbacks": [seen]}) == ANSWERS[0]
        (start, run, parent), (end, ended, _) = seen.events
        assert (start, end, ended) == ("start", "end", run)
        (root,) = collected.traced_runs
        assert seen.chains[seen.chains[parent]] is None  # retriever, in parallel, in the sequence
        (parallel,) = [child for child in root.child_runs if child.id == parent]
        (retrieved,) = [child for child in parallel.child_runs if child.run_type == "retriever"]
        assert (retrieved.id, retrieved.parent_run_id) == (run, parent)
        assert retrieved.inputs == {"query": QUESTIONS[0]}
        assert [d.page_content for d in retrieved.outputs["documents"]] == ANSWERS[:1]
        assert retrieved.extra["metadata"]["ls_embedding_provider"] == "KalmModalEmbeddings"
        assert secrets_in(seen.payloads, root.model_dump(), dumpd(embeddings), dumpd(store)) == []

    def test_callbacks_receive_the_error_unchanged(
        self, over: Any, tmp_path: Path, asynchronous: bool
    ) -> None:
        transport = ScriptedTransport([None, AuthenticationError("no")])
        embeddings = over(transport, KalmModalEmbeddings, **SECRETS)
        seen = Seen()
        with opened("in memory", tmp_path, embeddings) as store:
            store.add_texts(FACTS)
            with pytest.raises(AuthenticationError) as caught:
                way_of(chain_over(store), asynchronous)("x", {"callbacks": [seen]})
        assert [event for event, _, _ in seen.events] == ["start", "error"]
        assert seen.errors == [caught.value]
        assert isinstance(caught.value, KalmError)
        assert secrets_in(seen.payloads) == []

    def test_langsmiths_client_sends_whole_runs_and_no_secret(
        self, tmp_path: Path, asynchronous: bool
    ) -> None:
        sent: list[tuple[str, dict[str, Any]]] = []

        class LangSmith(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                sent.append((self.command, json.loads(body)))
                self.send_response(202)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_PATCH = do_POST  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        refused = reply(401, json.dumps({"error": {"message": "not hunter2", "code": None}}))
        with FaultyServer([None, None, refused]) as kalm, running(LangSmith) as url:
            client = Client(api_url=url, api_key="ls", auto_batch_tracing=False)
            settings = {"base_url": kalm.url, "model": EMBEDDED.space.model, **SECRETS}
            with KalmModalEmbeddings(**settings) as embeddings:
                with opened("in memory", tmp_path, embeddings) as store:
                    store.add_texts(FACTS)
                    ask = way_of(chain_over(store), asynchronous)
                    traced = {"callbacks": [LangChainTracer(client=client)]}
                    assert ask(FACTS[1], traced) == FACTS[1]
                    with pytest.raises(AuthenticationError):
                        ask("x", traced)
            client.close()
        retrievals = [run for _, run in sent if run["run_type"] == "retriever"]
        ended = [run for run in retrievals if run.get("end_time")]
        assert len(ended) == 2
        assert len({run["id"] for run in retrievals}) == 2
        assert ended[0]["outputs"]["documents"][0]["page_content"] == FACTS[1]
        assert "AuthenticationError" in ended[1]["error"]
        assert secrets_in(sent) == []

    def test_usage_is_reported_in_the_callers_context(
        self, over: Any, kind: str, tmp_path: Path, asynchronous: bool
    ) -> None:
        # Whom to charge is a context variable; sync, in worker threads, in tasks alike.
        charged: list[tuple[str, int]] = []

        def charge(usage: Usage) -> None:
            charged.append((tenant.get(), usage.tokens))

        embeddings = over(ScriptedTransport(), KalmModalEmbeddings, on_usage=charge)
        with opened(kind, tmp_path, embeddings) as store:
            store.add_texts(FACTS)
            charged.clear()
            retriever = store.as_retriever()

            def ask_all(name: str) -> None:
                tenant.set(name)
                retriever.batch(QUESTIONS)

            async def aask_all(name: str) -> None:
                tenant.set(name)
                await retriever.abatch(QUESTIONS)

            async def both() -> None:
                await asyncio.gather(aask_all("anna"), aask_all("ben"))

            if asynchronous:
                asyncio.run(both())
            else:
                threads = [threading.Thread(target=ask_all, args=(n,)) for n in ("anna", "ben")]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        assert sorted(charged) == [("anna", 1)] * 3 + [("ben", 1)] * 3
