"""Subclasses that override LlamaIndex's hooks: each public method uses them, once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.schema import TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from scripted import ScriptedTransport

from kalm_integrations.errors import InputTooLongError, InvalidText
from kalm_integrations.llama_index import KalmModalEmbeddings
from kalm_integrations.protocol import EmbedRequest


class One(KalmModalEmbeddings):
    def _get_text_embedding(self, text: str) -> list[float]:
        return super()._get_text_embedding(f"+{text}")


class Many(KalmModalEmbeddings):
    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return super()._get_text_embeddings([f"+{text}" for text in texts])


class OneAsync(KalmModalEmbeddings):
    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await super()._aget_text_embedding(f"+{text}")


class ManyAsync(KalmModalEmbeddings):
    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await super()._aget_text_embeddings([f"+{text}" for text in texts])


class Query(KalmModalEmbeddings):
    def _get_query_embedding(self, query: str) -> list[float]:
        return super()._get_query_embedding(f"?{query}")


class QueryAsync(KalmModalEmbeddings):
    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await super()._aget_query_embedding(f"?{query}")


class Both(One, Many, OneAsync, ManyAsync, Query, QueryAsync):
    """Every hook, over several classes, would add a prefix per class: overrides them all."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return KalmModalEmbeddings._get_text_embedding(self, f"+{text}")

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return KalmModalEmbeddings._get_text_embeddings(self, [f"+{text}" for text in texts])

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await KalmModalEmbeddings._aget_text_embedding(self, f"+{text}")

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await KalmModalEmbeddings._aget_text_embeddings(self, [f"+{t}" for t in texts])


class Mixin:
    def _get_text_embedding(self, text: str) -> Any:
        return super()._get_text_embedding(f"+{text}")  # type: ignore[misc]


class Mixed(Mixin, KalmModalEmbeddings):
    pass


TEXTS = ["a", "b", "c"]
SYNC_DOCUMENTS: dict[str, Callable[[Any], Any]] = {
    "get_text_embedding": lambda model: [model.get_text_embedding(text) for text in TEXTS],
    "get_text_embedding_batch": lambda model: model.get_text_embedding_batch(TEXTS),
    "show_progress": lambda model: model.get_text_embedding_batch(TEXTS, show_progress=True),
    "__call__": lambda model: model([TextNode(text=text) for text in TEXTS]),
}
ASYNC_DOCUMENTS: dict[str, Callable[[Any], Any]] = {
    "aget_text_embedding": lambda model: asyncio.gather(*map(model.aget_text_embedding, TEXTS)),
    "aget_text_embedding_batch": lambda model: model.aget_text_embedding_batch(TEXTS),
    "show_progress": lambda model: model.aget_text_embedding_batch(TEXTS, show_progress=True),
    "acall": lambda model: model.acall([TextNode(text=text) for text in TEXTS]),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"embed_batch_size": 2},
    {"embed_batch_size": 1, "num_workers": 2},
]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [One, Many, OneAsync, ManyAsync, Both, Mixed])
def test_text_hooks(
    over: Any, kind: type[KalmModalEmbeddings], options: dict[str, Any], cached: bool
) -> None:
    async def awaited(method: Callable[[Any], Any], model: Any) -> None:
        await method(model)

    for methods in SYNC_DOCUMENTS, ASYNC_DOCUMENTS:
        for name, method in methods.items():
            if methods is SYNC_DOCUMENTS and kind in (OneAsync, ManyAsync):
                continue  # LlamaIndex's sync methods never call async hooks
            transport = ScriptedTransport()
            cache = {"embeddings_cache": SimpleKVStore()} if cached else {}
            model = over(transport, kind, **options, **cache)
            if methods is SYNC_DOCUMENTS:
                method(model)
            else:
                asyncio.run(awaited(method, model))
            assert sorted(transport.sent) == ["+a", "+b", "+c"], name


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", [Query, QueryAsync, Both])
def test_query_hooks(over: Any, kind: type[KalmModalEmbeddings], cached: bool) -> None:
    transport = ScriptedTransport()
    cache = {"embeddings_cache": SimpleKVStore()} if cached else {}
    model = over(transport, kind, **cache)
    if kind is not QueryAsync:
        model.get_query_embedding("a")
        model.get_agg_embedding_from_queries(["b", "c"])
    asyncio.run(model.aget_query_embedding("d"))
    asyncio.run(model.aget_agg_embedding_from_queries(["e", "f"]))
    assert transport.sent == [f"?{text}" for text in "abcdef"][-len(transport.sent) :]
    assert len(transport.sent) == (3 if kind is QueryAsync else 6)
    assert {request.role for request in transport.requests} == {"query"}


def test_each_class_of_a_hierarchy_applies_its_change_once(over: Any) -> None:
    class Twice(One):
        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return super()._get_text_embeddings([f"-{text}" for text in texts])

    transport = ScriptedTransport()
    model = over(transport, Twice)
    model.get_text_embedding("a")
    model.get_text_embedding_batch(["b", "c"])
    asyncio.run(model.aget_text_embedding_batch(["d", "e"]))
    assert transport.sent == ["+-a", "+-b", "+-c", "+-d", "+-e"]


def test_a_hook_that_needs_no_service(over: Any) -> None:
    class Constant(KalmModalEmbeddings):
        def _get_text_embedding(self, text: str) -> list[float]:
            return [float(text)]

    transport = ScriptedTransport()
    model = over(transport, Constant, embed_batch_size=2)
    assert model.get_text_embedding_batch(["1", "2", "3"]) == [[1.0], [2.0], [3.0]]
    assert asyncio.run(model.aget_text_embedding_batch(["1", "2"])) == [[1.0], [2.0]]
    assert transport.sent == []


def test_batches_hold_embed_batch_size_texts(over: Any) -> None:
    sizes: list[int] = []

    class Counting(KalmModalEmbeddings):
        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            sizes.append(len(texts))
            return super()._get_text_embeddings(texts)

    over(ScriptedTransport(), Counting, embed_batch_size=4).get_text_embedding_batch(list("abcdef"))
    assert sizes == [4, 2]


def test_a_hook_may_replace_texts_that_cannot_be_embedded(over: Any) -> None:
    class Cleaning(KalmModalEmbeddings):
        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return super()._get_text_embeddings([text.strip() or "(empty)" for text in texts])

    transport = ScriptedTransport()
    model = over(transport, Cleaning)
    assert len(model.get_text_embedding_batch(["a", "  "])) == 2
    assert transport.sent == ["a", "(empty)"]


def test_a_refused_text_that_a_hook_has_changed_is_still_named(over: Any) -> None:
    def refuse(request: EmbedRequest) -> None:
        raise InputTooLongError.of([InvalidText(1, "is long")])

    model = over(ScriptedTransport(refuse=refuse), Many)
    with pytest.raises(InputTooLongError, match=r"texts\[1\] is long"):
        model.get_text_embedding_batch(["a", "b"])


def test_caches_keep_the_vectors_of_each_class_apart(over: Any) -> None:
    store, transport = SimpleKVStore(), ScriptedTransport()
    plain = over(transport, KalmModalEmbeddings, embeddings_cache=store)
    many = over(transport, Many, embeddings_cache=store)
    for model in plain, many, plain, many:
        model.get_text_embedding_batch(["a"])
    assert transport.sent == ["a", "+a"]
    assert plain.cache_namespace != many.cache_namespace
    assert plain.query_cache_namespace != many.query_cache_namespace
    assert plain.to_dict() != many.to_dict()  # the key of IngestionPipeline's cache
    assert Many.from_dict(many.to_dict()).cache_namespace == many.cache_namespace
    assert over(transport, type("Plain", (KalmModalEmbeddings,), {})).to_dict() == plain.to_dict()
