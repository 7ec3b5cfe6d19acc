"""LlamaIndex's `embeddings_cache`, with a collection for each kind of vector.

LlamaIndex's key is the text alone: a query would get the vector of a document with the same words,
and one model the vectors of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from llama_index.core.storage.kvstore.types import BaseKVStore

from kalm_integrations.prompts import Role

_role: ContextVar[Role] = ContextVar("kalm_cached_role", default="document")


@contextmanager
def looking_up(role: Role) -> Iterator[None]:
    """The role of the vectors that are looked up in this block; outside of it, documents."""
    token = _role.set(role)
    try:
        yield
    finally:
        _role.reset(token)


class RoleCache(BaseKVStore):
    """`store`, with a collection for the vectors of each namespace.

    Args:
        store: The user's store; what other models left in it is neither read nor touched.
        namespaces: By role: a name that changes whenever its vectors may.
    """

    def __init__(self, store: BaseKVStore, namespaces: Mapping[Role, str]) -> None:
        self.store = store
        self.namespaces = namespaces

    def _collection(self) -> str:
        return self.namespaces[_role.get()]

    def put(self, key: str, val: dict[str, Any], collection: str = "") -> None:
        self.store.put(key, val, self._collection())

    async def aput(self, key: str, val: dict[str, Any], collection: str = "") -> None:
        await self.store.aput(key, val, self._collection())

    def get(self, key: str, collection: str = "") -> dict[str, Any] | None:
        return self.store.get(key, self._collection())

    async def aget(self, key: str, collection: str = "") -> dict[str, Any] | None:
        return await self.store.aget(key, self._collection())

    def get_all(self, collection: str = "") -> dict[str, dict[str, Any]]:
        return self.store.get_all(self._collection())

    async def aget_all(self, collection: str = "") -> dict[str, dict[str, Any]]:
        return await self.store.aget_all(self._collection())

    def delete(self, key: str, collection: str = "") -> bool:
        return self.store.delete(key, self._collection())

    async def adelete(self, key: str, collection: str = "") -> bool:
        return await self.store.adelete(key, self._collection())
