"""The base class of the adapters: it holds a `KalmClient` and forwards its methods."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterable
from typing import Any, TypedDict

from kalm_integrations.client import KalmClient, OnError
from kalm_integrations.client_base import ClientBase, client_defaults
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.identity import VectorIdentity
from kalm_integrations.options import ClientOptions, clear_arguments
from kalm_integrations.progress import Progress
from kalm_integrations.prompts import Role
from kalm_integrations.result import EmbeddedBatch, EmbeddingResult


class SharedClient(TypedDict, total=False):
    """The argument that excludes those of `KalmClient`."""

    client: KalmClient | None
    """A client to share, instead of its arguments. Default: None."""


def adapter_defaults() -> dict[str, Any]:
    """The default of each argument of an adapter."""
    return {"client": None, **client_defaults()}


class ClientAdapter(ClientBase):
    """A framework's embedding model that embeds with `client`.

    Adapters may share one client, and with it the connections and the limit on concurrent
    requests. Closing any of them closes the client's connections; the next call opens new ones.
    """

    _client: KalmClient

    @property
    def client(self) -> KalmClient:
        """The client that embeds."""
        return self._client

    @property
    def config(self) -> ClientConfig:
        return self._client.config

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


def client_of(client: KalmClient | None, options: ClientOptions) -> KalmClient:
    """Return `client`, or a new one with `options`.

    Raises:
        ConfigurationError: Both were passed.
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
        clear_arguments(options)
