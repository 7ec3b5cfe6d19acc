"""Completes the hooks that a subclass overrides, so that every public method uses them.

LlamaIndex tells subclasses to override `_get_text_embedding`, `_get_query_embedding` and their
variants, and each public method calls another variant. So a class that overrides some of them gets
the others: batches from single texts, single texts from batches, async ones from sync ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import takewhile
from typing import Any, Final

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding

_TEXT: Final = {"_get_text_embedding", "_get_text_embeddings"}
_ASYNC_TEXT: Final = {"_aget_text_embedding", "_aget_text_embeddings"}
_HOOKS: Final = _TEXT | _ASYNC_TEXT | {"_get_query_embedding", "_aget_query_embedding"}


def complete_hooks(cls: type[BaseEmbedding], base: type[BaseEmbedding]) -> None:
    """Derive the hooks that `cls` and its mixins lack from those that they define.

    Derived hooks call those of `cls`, not of the object: with `super()`, each class of a hierarchy
    applies its change once.
    """
    new = takewhile(lambda each: each is cls or not issubclass(each, base), cls.__mro__)
    defined = _defined(new)

    def _get_text_embedding(self: Any, text: str) -> Embedding:
        return cls._get_text_embeddings(self, [text])[0]

    def _get_text_embeddings(self: Any, texts: list[str]) -> list[Embedding]:
        return [cls._get_text_embedding(self, text) for text in texts]

    async def _aget_text_embedding(self: Any, text: str) -> Embedding:
        if defined & _ASYNC_TEXT:
            return (await cls._aget_text_embeddings(self, [text]))[0]
        return await asyncio.to_thread(cls._get_text_embedding, self, text)

    async def _aget_text_embeddings(self: Any, texts: list[str]) -> list[Embedding]:
        if defined & _ASYNC_TEXT:
            return await asyncio.gather(*(cls._aget_text_embedding(self, text) for text in texts))
        return await asyncio.to_thread(cls._get_text_embeddings, self, texts)

    async def _aget_query_embedding(self: Any, query: str) -> Embedding:
        return await asyncio.to_thread(cls._get_query_embedding, self, query)

    derived: list[Any] = []
    if defined & _TEXT:
        derived += [_get_text_embedding, _get_text_embeddings]
    if defined & (_TEXT | _ASYNC_TEXT):
        derived += [_aget_text_embedding, _aget_text_embeddings]
    if "_get_query_embedding" in defined:
        derived += [_aget_query_embedding]
    for hook in derived:
        if hook.__name__ not in defined:
            setattr(cls, hook.__name__, hook)


def overrides_hooks(cls: type[BaseEmbedding], base: type[BaseEmbedding]) -> bool:
    """Whether `cls` changes texts or vectors of `base`."""
    return bool(_defined(takewhile(lambda each: each is not base, cls.__mro__)))


def _defined(classes: Iterable[type]) -> set[str]:
    return _HOOKS & {name for each in classes for name in vars(each)}
