"""What both adapters share: they hold a `KalmClient` and pass on what frameworks do not know."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterable
from typing import Any, TypedDict

from kalm_integrations.client import ContextManaged, KalmClient, OnError, Progress
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.identity import VectorIdentity
from kalm_integrations.options import ClientConfig, ClientOptions, forget
from kalm_integrations.prompts import Role
from kalm_integrations.result import EmbeddedBatch, EmbeddingResult


class SharedClient(TypedDict, total=False):
    """The argument that excludes those of `KalmClient`."""

    client: KalmClient | None
    """A client to share, instead of its arguments. Default: None."""


class ClientAdapter(ContextManaged):
    """A framework's embedding model that embeds with `client`.

    Adapters may share one client, and with it the connections and the limit on concurrent
    requests. Closing any of them closes the client's connections; the next call opens new ones.
    """

    _client: KalmClient

    @property
    def client(self) -> KalmClient:
        """The client that embeds; its `config` has all arguments."""
        return self._client

    @property
    def vector_dimensions(self) -> int:
        """As `KalmClient.vector_dimensions`."""
        return self._client.vector_dimensions

    @property
    def vector_identity(self) -> VectorIdentity:
        """As `KalmClient.vector_identity`."""
        return self._client.vector_identity

    @property
    def cache_namespace(self) -> str:
        """As `KalmClient.cache_namespace`."""
        return self._client.cache_namespace

    @property
    def query_cache_namespace(self) -> str:
        """As `KalmClient.query_cache_namespace`."""
        return self._client.query_cache_namespace

    def embed(
        self,
        texts: Iterable[str],
        *,
        role: Role = "document",
        on_progress: Progress | None = None,
    ) -> EmbeddingResult:
        """As `KalmClient.embed`."""
        return self._client.embed(texts, role=role, on_progress=on_progress)

    async def aembed(
        self,
        texts: Iterable[str],
        *,
        role: Role = "document",
        on_progress: Progress | None = None,
    ) -> EmbeddingResult:
        """As `KalmClient.aembed`."""
        return await self._client.aembed(texts, role=role, on_progress=on_progress)

    def iter_embed(
        self, texts: Iterable[str], *, role: Role = "document", on_error: OnError = "raise"
    ) -> Generator[EmbeddedBatch]:
        """As `KalmClient.iter_embed`."""
        return self._client.iter_embed(texts, role=role, on_error=on_error)

    def aiter_embed(
        self, texts: Iterable[str], *, role: Role = "document", on_error: OnError = "raise"
    ) -> AsyncGenerator[EmbeddedBatch]:
        """As `KalmClient.aiter_embed`."""
        return self._client.aiter_embed(texts, role=role, on_error=on_error)

    def warm_up(self, timeout: float | None = None) -> VectorIdentity:
        """As `KalmClient.warm_up`."""
        return self._client.warm_up(timeout)

    async def awarm_up(self, timeout: float | None = None) -> VectorIdentity:
        """As `KalmClient.awarm_up`."""
        return await self._client.awarm_up(timeout)

    def close(self) -> None:
        """As `KalmClient.close`."""
        self._client.close()

    async def aclose(self) -> None:
        """As `KalmClient.aclose`."""
        await self._client.aclose()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ClientConfig.model_fields:
            raise AttributeError(f"{name} is fixed: use with_options({name}=...)")
        super().__setattr__(name, value)


def client_of(client: KalmClient | None, options: ClientOptions) -> KalmClient:
    """Return `client`, or a new one with `options`.

    Raises:
        ConfigurationError: Both are given.
    """
    try:
        if client is None:
            return KalmClient(**options)
        if options:
            raise ConfigurationError(
                f"client= and {min(options)}= contradict each other: pass "
                f"client.with_options({min(options)}=...)."
            )
        return client
    finally:
        forget(options)
