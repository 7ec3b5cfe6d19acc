"""LlamaIndex's two caches, its dumps, and its worker processes, each with the real framework.

`IngestionPipeline(cache=...)` is keyed by the node's text and the dump of the embedding model;
`embeddings_cache` by the text alone, which is why ours keeps roles and models apart.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.schema import Document, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.core.vector_stores import SimpleVectorStore
from scripted import ScriptedTransport, vector_of

from kalm_integrations import llama_index, models
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import (
    IdentityMismatchError,
    InputTooLongError,
    InvalidInputError,
    InvalidText,
    NotFoundError,
)
from kalm_integrations.llama_index import KalmModalEmbeddings
from kalm_integrations.llama_index.cache import RoleCache
from kalm_integrations.protocol import EmbedRequest

FACTS = ["K2 is 8,611 metres high.", "The Nile is long.", "Bread rises because of yeast."]
KALM = {"backend": "http", "base_url": "http://nowhere"}
LOCAL = {"backend": "local"}


def ingest(model: KalmModalEmbeddings, cache: IngestionCache) -> None:
    nodes = [TextNode(text=fact) for fact in FACTS]
    done = IngestionPipeline(transformations=[model], cache=cache).run(nodes=nodes)
    assert [node.embedding for node in done] == [vector_of(fact).tolist() for fact in FACTS]


class TestPipelineCache:
    """What busts it is what decides the vectors, and nothing else."""

    TUNING = (
        {"batch_size": 7},
        {"embed_batch_size": 3},
        {"max_concurrency": 2},
        {"timeout": 17.0},
        {"connect_timeout": 3.0},
        {"keepalive_timeout": 3.0},
        {"hedge": True},
        {"max_retries": 1},
        {"show_progress": True},
        {"num_workers": 4},
        {"api_key": "another"},
        {"modal_key": "another", "modal_secret": "another"},
        {"on_usage": print},
        {"vector_dtype": "float32"},
        {"model_name": "universal-sentence-encoder-multilingual-3"},
        # The default, passed explicitly.
        {"model": "universal-sentence-encoder-multilingual-3"},
        {"dimensions": 512},
        {"expected_identity": models.EMBEDDED.space},
    )

    @pytest.mark.parametrize("tuning", TUNING, ids=lambda tuning: next(iter(tuning)))
    def test_tuning_keeps_the_cache(self, over: Any, tuning: dict[str, Any]) -> None:
        cache, transport = IngestionCache(), ScriptedTransport()
        ingest(over(transport, KalmModalEmbeddings), cache)
        ingest(over(transport, KalmModalEmbeddings, **tuning), cache)
        assert len(transport.requests) == 1

    def test_a_new_key_in_the_environment_keeps_the_cache(
        self, over: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache, transport = IngestionCache(), ScriptedTransport()
        for key in ("old", "new"):
            monkeypatch.setenv("KALM_API_KEY", key)
            ingest(over(transport, KalmModalEmbeddings), cache)
        assert len(transport.requests) == 1

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (KALM, LOCAL),
            (KALM, {**KALM, "model": "another/model"}),
            (KALM, {**KALM, "dimensions": 256}),
            (KALM, {**KALM, "base_url": "http://elsewhere"}),
            (KALM, {**KALM, "query_instruction": "question"}),
            (KALM, {**KALM, "document_instruction": "passage: {text}"}),
            (KALM, {**KALM, "truncate": "end"}),
            (KALM, {**KALM, "expected_identity": models.EMBEDDED.space}),
        ],
        ids=lambda arguments: ",".join(map(str, list(arguments.values())[-1:]))[:20],
    )
    def test_arguments_that_decide_vectors_invalidate_the_cache(
        self, before: dict[str, Any], after: dict[str, Any]
    ) -> None:
        assert _keys(KalmModalEmbeddings(**before)) != _keys(KalmModalEmbeddings(**after))

    def test_a_release_with_another_model_invalidates_the_cache(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = _keys(KalmModalEmbeddings(backend="local"))
        _release_another_model(monkeypatch)
        assert _keys(KalmModalEmbeddings(backend="local")) != before

    def test_every_argument_is_classified(self) -> None:
        # A new one must be put into TUNING above, or into a dump.
        tuning = {name for arguments in self.TUNING for name in arguments}
        assert tuning | llama_index.STORED | {"transport"} >= ClientConfig.model_fields.keys()

    def test_the_cache_survives_the_process(self, over: Any, tmp_path: Path) -> None:
        path, transport = str(tmp_path / "cache.json"), ScriptedTransport()
        cache = IngestionCache()
        ingest(over(transport, KalmModalEmbeddings), cache)
        cache.persist(path)
        ingest(over(transport, KalmModalEmbeddings), IngestionCache.from_persist_path(path))
        assert len(transport.requests) == 1

    def test_upserts_embed_only_what_is_new(self, over: Any) -> None:
        transport = ScriptedTransport()
        pipeline = IngestionPipeline(
            transformations=[over(transport, KalmModalEmbeddings)],
            docstore=SimpleDocumentStore(),
            vector_store=SimpleVectorStore(),
            disable_cache=True,
        )
        documents = [Document(text=fact, id_=str(i)) for i, fact in enumerate(FACTS)]
        pipeline.run(documents=documents)
        pipeline.run(documents=[*documents, Document(text="New.", id_="new")])
        assert transport.sent == [*FACTS, "New."]


class TestEmbeddingsCache:
    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_a_query_never_gets_the_vector_of_a_document(
        self, over: Any, asynchronous: bool
    ) -> None:
        transport = ScriptedTransport()
        model = over(
            transport,
            KalmModalEmbeddings,
            query_instruction="Q: {text}",
            embeddings_cache=SimpleKVStore(),
        )
        document, query = vector_of("K2").tolist(), vector_of("Q: K2").tolist()
        for _ in range(3):
            if asynchronous:
                assert asyncio.run(model.aget_text_embedding("K2")) == document
                assert asyncio.run(model.aget_query_embedding("K2")) == query
                assert asyncio.run(model.aget_text_embedding_batch(["K2"])) == [document]
            else:
                assert model.get_text_embedding("K2") == document
                assert model.get_query_embedding("K2") == query
                assert model.get_text_embedding_batch(["K2"]) == [document]
        assert transport.sent == ["K2", "Q: K2"]

    def test_two_configurations_share_a_store_but_no_vector(self, over: Any) -> None:
        store, transport = SimpleKVStore(), ScriptedTransport()
        for template in ("{text}", "title: {text}"):
            model = over(
                transport,
                KalmModalEmbeddings,
                document_instruction=template,
                embeddings_cache=store,
            )
            assert model.get_text_embedding("K2") == vector_of(template.format(text="K2")).tolist()

    def test_entries_of_another_model_are_neither_used_nor_changed(self, over: Any) -> None:
        store = SimpleKVStore()
        store.put("K2", {"id": [1.0, 2.0]}, collection="embeddings")
        model = over(ScriptedTransport(), KalmModalEmbeddings, embeddings_cache=store)
        assert model.get_text_embedding("K2") == vector_of("K2").tolist()
        assert store.get("K2", collection="embeddings") == {"id": [1.0, 2.0]}
        assert model.embeddings_cache.get_all().keys() == {"K2"}
        assert model.embeddings_cache.delete("K2")
        assert store.get("K2", collection=model.cache_namespace) is None

    def test_an_updated_copy_has_its_own_namespaces(self, over: Any) -> None:
        model = over(ScriptedTransport(), KalmModalEmbeddings, embeddings_cache=SimpleKVStore())
        model.get_query_embedding("K2")
        model.get_text_embedding("K2")
        copied = model.model_copy(
            update={"query_instruction": "Q: {text}", "document_instruction": "D: {text}"}
        )
        assert copied.get_query_embedding("K2") == vector_of("Q: K2").tolist()
        assert copied.get_text_embedding("K2") == vector_of("D: K2").tolist()
        assert model.get_text_embedding("K2") == vector_of("K2").tolist()

    def test_a_store_that_is_assigned_later_has_namespaces_too(self, over: Any) -> None:
        model = over(ScriptedTransport(), KalmModalEmbeddings)
        model.embeddings_cache = SimpleKVStore()
        assert isinstance(model.embeddings_cache, RoleCache)
        model.embeddings_cache = None
        assert model.embeddings_cache is None
        with pytest.raises(TypeError, match="BaseKVStore"):
            KalmModalEmbeddings(backend="local", embeddings_cache={})

    def test_the_store_is_shared_between_processes(self, tmp_path: Path) -> None:
        """A second process finds the vectors of the first, through the store's own file."""
        path = tmp_path / "vectors.json"
        code = (
            "import sys\n"
            "from pathlib import Path\n"
            "from llama_index.core.storage.kvstore import SimpleKVStore\n"
            "from kalm_integrations.llama_index import KalmModalEmbeddings\n"
            "path = sys.argv[1]\n"
            "known = Path(path).exists()\n"
            "store = SimpleKVStore.from_persist_path(path) if known else SimpleKVStore()\n"
            "usage = []\n"
            "model = KalmModalEmbeddings(backend='local', embeddings_cache=store,"
            " on_usage=usage.append)\n"
            "vectors = model.get_text_embedding_batch(['K2', 'Nile'])\n"
            "store.persist(path)\n"
            "print(len(usage), vectors[1][:3])\n"
        )
        outs = []
        for _ in range(2):
            run = [sys.executable, "-W", "error", "-c", code, str(path)]
            outs.append(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
        assert [out.split()[0] for out in outs] == ["1", "0"]
        assert outs[0].split()[1:] == outs[1].split()[1:]


class TestDumps:
    @pytest.mark.parametrize(
        "arguments",
        [
            {**LOCAL, "truncate": "end", "query_instruction": "question"},
            {**KALM, "dimensions": 256, "expected_identity": models.EMBEDDED.space},
            {**KALM, "model": "another/model", "document_instruction": "passage: {text}"},
        ],
        ids=["local", "KaLM", "another"],
    )
    def test_a_dump_rebuilds_what_decides_the_vectors(self, arguments: dict[str, Any]) -> None:
        model = KalmModalEmbeddings(**arguments, batch_size=7)
        for twin in (
            KalmModalEmbeddings.from_dict(model.to_dict()),
            KalmModalEmbeddings.from_json(model.to_json()),
        ):
            assert twin.to_dict() == model.to_dict()
            assert twin.vector_identity == model.vector_identity
            assert twin.client.config.query_template == model.client.config.query_template
        assert (
            KalmModalEmbeddings.from_dict(model.to_dict(), batch_size=9).client.config.batch_size
            == 9
        )

    def test_a_dump_is_plain_json_with_the_namespace_of_its_vectors(self) -> None:
        model = KalmModalEmbeddings(backend="local", api_key="hunter2", embed_batch_size=5)
        dumped = json.loads(model.to_json())
        assert dumped.keys() == llama_index.STORED | {"cache_namespace", "modal_class"}
        assert dumped["cache_namespace"] == model.cache_namespace

    def test_arguments_that_are_not_dumped_are_read_from_the_environment_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dumped = KalmModalEmbeddings(**KALM, api_key="old").to_dict()
        monkeypatch.setenv("KALM_API_KEY", "new")
        twin = KalmModalEmbeddings.from_dict(dumped)
        assert twin.client.config.api_key.get_secret_value() == "new"

    def test_a_dump_of_other_vectors_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        dumped = KalmModalEmbeddings(backend="local").to_dict()
        _release_another_model(monkeypatch)
        with pytest.raises(IdentityMismatchError, match="dumped with document vectors kalm-doc"):
            KalmModalEmbeddings.from_dict(dumped)
        asked_for = KalmModalEmbeddings.from_dict(dumped, document_instruction="d: {text}")
        assert asked_for.client.config.document_template == "d: {text}"

    def test_a_pickle_keeps_the_tuning_and_the_cache(self) -> None:
        model = KalmModalEmbeddings(
            backend="local", batch_size=7, embed_batch_size=5, embeddings_cache=SimpleKVStore()
        )
        model.get_text_embedding("K2")
        twin = pickle.loads(pickle.dumps(model))
        assert (twin.client.config.batch_size, twin.embed_batch_size) == (7, 5)
        assert twin.embeddings_cache.get("K2") == model.embeddings_cache.get("K2")
        assert isinstance(twin.embeddings_cache.store, SimpleKVStore)


class TestBatches:
    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_an_invalid_text_is_named_by_the_callers_index(
        self, over: Any, asynchronous: bool
    ) -> None:
        transport = ScriptedTransport()
        model = over(
            transport, KalmModalEmbeddings, embed_batch_size=2, embeddings_cache=SimpleKVStore()
        )
        model.get_text_embedding_batch(["a", "b"])
        sent = list(transport.sent)
        with pytest.raises(InvalidInputError, match=r"texts\[4\] is empty"):
            if asynchronous:
                asyncio.run(model.aget_text_embedding_batch(["a", "b", "c", "d", ""]))
            else:
                model.get_text_embedding_batch(["a", "b", "c", "d", ""])
        assert transport.sent == sent

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_a_text_that_the_service_refuses_is_named_by_the_callers_index(
        self, over: Any, asynchronous: bool
    ) -> None:
        def refuse(request: EmbedRequest) -> None:
            if "long" in request.texts:
                raise InputTooLongError.of([InvalidText(request.texts.index("long"), "is long")])

        model = over(
            ScriptedTransport(refuse=refuse),
            KalmModalEmbeddings,
            embed_batch_size=2,
            embeddings_cache=SimpleKVStore(),
        )
        model.get_text_embedding_batch(["c"])  # cached: what is handed over is not the whole batch
        texts = ["a", "b", "c", "long", "d", "long"]
        with pytest.raises(InputTooLongError) as caught:
            if asynchronous:
                asyncio.run(model.aget_text_embedding_batch(texts))
            else:
                model.get_text_embedding_batch(texts)
        assert [bad.index for bad in caught.value.invalid] == [3, 5]

    @pytest.mark.parametrize("num_workers", [None, 2])
    async def test_a_failing_batch_cancels_the_others(self, over: Any, num_workers: Any) -> None:
        transport = ScriptedTransport(
            [NotFoundError("gone")],
            delay=lambda request: 0.05 if request.texts[0] == "text 0" else 0.2,
        )
        model = over(
            transport,
            KalmModalEmbeddings,
            embed_batch_size=10,
            batch_size=1,
            max_concurrency=4,
            num_workers=num_workers,
        )
        with pytest.raises(NotFoundError):
            await model.aget_text_embedding_batch([f"text {i}" for i in range(40)])
        await asyncio.sleep(0.1)  # cancelling takes a moment; all 40 would take 2 s
        before = len(transport.requests)
        await asyncio.sleep(0.5)
        assert (len(transport.requests), transport.in_flight) == (before, 0)


WORKERS = """
import asyncio, sys
import numpy as np
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import Document
from kalm_integrations.llama_index import KalmModalEmbeddings

if __name__ == "__main__":
    texts = [f"Fact number {i} is about {word}." for i, word in enumerate("abcdefgh")]
    model = KalmModalEmbeddings(backend="local")
    here = model.get_text_embedding_batch(texts)  # its I/O thread runs before workers start
    pipeline = IngestionPipeline(transformations=[model])
    documents = [Document(text=text) for text in texts]
    if sys.argv[1] == "run":
        nodes = pipeline.run(documents=documents, num_workers=2)
    else:
        nodes = asyncio.run(pipeline.arun(documents=documents, num_workers=2))
    order = {node.get_content(): node.embedding for node in nodes}
    assert np.allclose([order[text] for text in texts], here, atol=1e-3)
    before = len(pipeline.cache.cache.get_all(collection=pipeline.cache.collection))
    print(len(nodes), before > 0)
"""


@pytest.mark.parametrize("method", ["run", "arun"])
def test_worker_processes(method: str, tmp_path: Path) -> None:
    """`run` spawns; `arun` starts workers as the platform does: by fork on older Pythons."""
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, script, method], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "8 True\n", done.stderr


def _keys(model: KalmModalEmbeddings) -> str:
    from llama_index.core.ingestion.pipeline import get_transformation_hash

    return get_transformation_hash([TextNode(text="K2")], model)


def _release_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    space = replace(models.EMBEDDED.space, revision="another")
    released = replace(models.EMBEDDED, space=space)
    monkeypatch.setitem(models._KNOWN, space.model, released)
