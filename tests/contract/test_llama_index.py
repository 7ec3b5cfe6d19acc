"""The LlamaIndex class, with the real llama-index-core."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent, EmbeddingStartEvent
from llama_index.core.schema import Document, TextNode
from scripted import ScriptedTransport

from kalm_integrations import KalmClient
from kalm_integrations.errors import ConfigurationError, InvalidInputError
from kalm_integrations.llama_index import KalmModalEmbeddings

FACTS = [
    "K2 is 8,611 metres high.",
    "The Nile flows through eleven countries.",
    "Bread rises because yeast gives off gas.",
]


@pytest.fixture
def local() -> KalmModalEmbeddings:
    return KalmModalEmbeddings(backend="local")


@pytest.fixture
def global_embed_model(local: KalmModalEmbeddings) -> Iterator[KalmModalEmbeddings]:
    before = Settings._embed_model
    Settings.embed_model = local
    yield local
    Settings._embed_model = before


class TestVectors:
    def test_every_method_gives_the_clients_vectors(self, local: KalmModalEmbeddings) -> None:
        expected = KalmClient(backend="local").embed(FACTS).vectors
        run = asyncio.run
        for got in (
            local.get_text_embedding_batch(FACTS),
            run(local.aget_text_embedding_batch(FACTS)),
            [local.get_text_embedding(text) for text in FACTS],
            [run(local.aget_text_embedding(text)) for text in FACTS],
            [local.get_query_embedding(text) for text in FACTS],  # no instruction by default
            [run(local.aget_query_embedding(text)) for text in FACTS],
        ):
            assert type(got[0][0]) is float
            assert np.allclose(got, expected, atol=1e-3)

    def test_aggregated_queries(self, local: KalmModalEmbeddings) -> None:
        mean = np.mean([local.get_query_embedding(text) for text in FACTS], axis=0)
        for got in (
            local.get_agg_embedding_from_queries(FACTS),
            asyncio.run(local.aget_agg_embedding_from_queries(FACTS)),
        ):
            assert np.allclose(got, mean)

    def test_roles_are_kept_apart(self, over: Any) -> None:
        transport = ScriptedTransport()
        model = over(transport, KalmModalEmbeddings, query_instruction="Q: {text}")
        model.get_query_embedding("a")
        asyncio.run(model.aget_query_embedding("b"))
        model.get_text_embedding("c")
        model.get_text_embedding_batch(["d"])
        assert transport.sent == ["Q: a", "Q: b", "c", "d"]
        roles = [request.role for request in transport.requests]
        assert roles == ["query", "query", "document", "document"]

    def test_a_batch_travels_in_concurrent_requests(self, over: Any) -> None:
        transport = ScriptedTransport(delay=lambda _: 0.02)
        model = over(transport, KalmModalEmbeddings, batch_size=10, max_concurrency=8)
        texts = [f"text {i}" for i in range(80)]
        model.get_text_embedding_batch(texts)
        assert transport.most_in_flight == 8

    @pytest.mark.parametrize("num_workers", [None, 1, 4])
    def test_requests_are_bounded_whatever_num_workers(self, over: Any, num_workers: Any) -> None:
        transport = ScriptedTransport(delay=lambda _: 0.005)
        model = over(
            transport,
            KalmModalEmbeddings,
            embed_batch_size=5,
            batch_size=5,
            max_concurrency=3,
            num_workers=num_workers,
        )
        texts = [f"text {i}" for i in range(200)]
        vectors = asyncio.run(model.aget_text_embedding_batch(texts))
        assert len(vectors) == 200
        assert transport.most_in_flight == 3


class TestFramework:
    def test_settings_and_index(self, global_embed_model: KalmModalEmbeddings) -> None:
        assert Settings.embed_model is global_embed_model
        index = VectorStoreIndex.from_documents([Document(text=fact) for fact in FACTS])
        hits = index.as_retriever(similarity_top_k=1).retrieve("Warum geht Brot auf?")
        assert hits[0].get_content() == FACTS[2]

    def test_async_index(self, local: KalmModalEmbeddings) -> None:
        nodes = [TextNode(text=fact) for fact in FACTS]
        index = VectorStoreIndex(nodes, embed_model=local, use_async=True)
        retriever = index.as_retriever(similarity_top_k=1)
        hits = asyncio.run(retriever.aretrieve("How tall is the mountain?"))
        assert hits[0].get_content() == FACTS[0]

    def test_ingestion_pipeline(self, local: KalmModalEmbeddings) -> None:
        nodes = IngestionPipeline(transformations=[local]).run(
            nodes=[TextNode(text=fact) for fact in FACTS]
        )
        assert [len(node.embedding or []) for node in nodes] == [512] * 3

    def test_an_invalid_text_leaves_the_index_unchanged(self, local: KalmModalEmbeddings) -> None:
        index = VectorStoreIndex([TextNode(text=FACTS[0])], embed_model=local)
        with pytest.raises(InvalidInputError, match=r"texts\[1\] is white space only"):
            index.insert_nodes([TextNode(text=FACTS[1]), TextNode(text="   ")])
        assert len(index.index_struct.nodes_dict) == 1

    def test_callbacks_see_chunks_and_vectors(self) -> None:
        class Recorder(BaseCallbackHandler):
            ended: list[tuple[CBEventType, Any]]

            def on_event_start(self, *_: Any, **__: Any) -> str:
                return ""

            def on_event_end(self, event_type: Any, payload: Any = None, **_: Any) -> None:
                self.ended.append((event_type, payload))

            def start_trace(self, trace_id: Any = None) -> None: ...
            def end_trace(self, trace_id: Any = None, trace_map: Any = None) -> None: ...

        recorder = Recorder([], [])
        recorder.ended = []
        model = KalmModalEmbeddings(backend="local", callback_manager=CallbackManager([recorder]))
        model.get_text_embedding_batch(FACTS)
        ((kind, payload),) = recorder.ended
        assert kind == CBEventType.EMBEDDING
        assert payload[EventPayload.CHUNKS] == FACTS
        assert len(payload[EventPayload.EMBEDDINGS]) == 3

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_instrumentation_events(self, local: KalmModalEmbeddings, asynchronous: bool) -> None:
        seen: list[Any] = []

        class Recorder(BaseEventHandler):
            def handle(self, event: Any, **_: Any) -> None:
                seen.append(event)

        root = get_dispatcher()
        recorder = Recorder()
        root.add_event_handler(recorder)
        try:
            local.get_query_embedding("q")
            if asynchronous:
                vectors = asyncio.run(local.aget_text_embedding_batch(FACTS))
            else:
                vectors = local.get_text_embedding_batch(FACTS)
        finally:
            root.event_handlers.remove(recorder)
        kinds = [type(event) for event in seen]
        assert kinds == [EmbeddingStartEvent, EmbeddingEndEvent] * 2
        assert [event.chunks for event in seen[1::2]] == [["q"], FACTS]
        assert seen[-1].embeddings == vectors
        # As LlamaIndex's own: within the call's span, and told of the same model.
        theirs, ours = seen[:2], seen[2:]
        assert [event.model_dump().keys() for event in ours] == [
            event.model_dump().keys() for event in theirs
        ]
        assert ours[0].model_dict == local.to_payload()
        assert ours[0].span_id == ours[1].span_id
        assert str(ours[0].span_id).split("-")[0].endswith("get_text_embedding_batch")

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_progress_moves_with_every_request(
        self, over: Any, asynchronous: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = over(ScriptedTransport(), KalmModalEmbeddings, batch_size=2)
        texts = [f"text {i}" for i in range(6)]

        def embed(**options: Any) -> str:
            if asynchronous:
                asyncio.run(model.aget_text_embedding_batch(texts, **options))
            else:
                model.get_text_embedding_batch(texts, **options)
            return capsys.readouterr().err

        assert embed() == ""
        output = embed(show_progress=True)
        assert "6/6" in output
        assert output.count("Embedding:") >= 2
        model = over(ScriptedTransport(), KalmModalEmbeddings, show_progress=True)
        assert "6/6" in embed()


class TestObject:
    def test_model_name_agrees_with_the_model_that_is_served(
        self, local: KalmModalEmbeddings
    ) -> None:
        name = "universal-sentence-encoder-multilingual-3"
        assert local.model_name == name
        assert KalmModalEmbeddings(backend="local", model=name, model_name=name) is not None
        with pytest.raises(ConfigurationError, match=r"model_name='other': .* with model="):
            KalmModalEmbeddings(backend="local", model_name="other")

    def test_arguments_of_the_client_cannot_be_changed_but_llama_indexs_can(
        self, local: KalmModalEmbeddings
    ) -> None:
        with pytest.raises(AttributeError, match="truncate is fixed: use with_options"):
            local.truncate = "end"
        local.embed_batch_size = 7
        assert local.embed_batch_size == 7

    def test_unknown_arguments_are_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="batchsize"):
            KalmModalEmbeddings(backend="local", batchsize=3)  # type: ignore[call-arg]

    def test_langchains_methods_name_the_right_class(self, local: KalmModalEmbeddings) -> None:
        store = InMemoryVectorStore(local)  # type: ignore[arg-type]
        for use in (lambda: store.add_texts(["a"]), lambda: store.similarity_search("a")):
            with pytest.raises(TypeError, match="from kalm_integrations import KalmModalEmbedd"):
                use()

    def test_dumps_and_pickles_have_no_secret(self) -> None:
        model = KalmModalEmbeddings(base_url="http://there", api_key="hunter2")
        for dump in (model.to_json(), repr(model), str(model.to_payload()), pickle.dumps(model)):
            assert "hunter2" not in str(dump)
        assert pickle.loads(pickle.dumps(model)).client.config.base_url == "http://there"

    def test_round_trips(self) -> None:
        model = KalmModalEmbeddings(backend="local", truncate="end", query_instruction="question")
        model.get_query_embedding("x")
        for twin in (
            KalmModalEmbeddings.from_dict(model.to_dict()),
            KalmModalEmbeddings.from_json(model.to_json()),
            pickle.loads(pickle.dumps(model)),
            copy.deepcopy(model),
        ):
            assert twin.to_dict() == model.to_dict()
            assert twin.get_query_embedding("x") == model.get_query_embedding("x")
