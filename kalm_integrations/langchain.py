"""`KalmModalEmbeddings` for LangChain."""

from __future__ import annotations

try:
    from langchain_core.embeddings import Embeddings
except ImportError as error:
    from kalm_integrations.install_hints import install_command

    raise ImportError(
        "kalm_integrations.KalmModalEmbeddings is the LangChain class and needs langchain-core: "
        f"{install_command('langchain')}. For LlamaIndex use "
        "`from kalm_integrations.llama_index import KalmModalEmbeddings`; without a framework, "
        "`from kalm_integrations import KalmClient`."
    ) from error

import sys
from typing import Never, Self, Unpack

from kalm_integrations.adapter import ClientAdapter, SharedClient, adapter_defaults, client_of
from kalm_integrations.client import KalmClient
from kalm_integrations.langchain_errors import raised_as_langchains
from kalm_integrations.options import ClientOptions, clear_arguments
from kalm_integrations.signatures import documented, refuse_positional


@documented(SharedClient, ClientOptions, defaults=adapter_defaults)
class KalmModalEmbeddings(ClientAdapter, Embeddings):
    """KaLM, or the embedded engine, as a LangChain embedding model.

    Takes the arguments of `KalmClient`, or `client=`, a `KalmClient` to share. The errors of the
    four methods of LangChain are LangChain's `ModelError`s too (`langchain_errors`).

    Examples:
        >>> embeddings = KalmModalEmbeddings(backend="local")
        >>> len(embeddings.embed_query("How tall is K2?"))
        512
    """

    def __init__(
        self,
        *positional: Never,
        client: KalmClient | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        refuse_positional(type(self), positional)
        self._client = client_of(client, options)

    def with_options(self, **options: Unpack[ClientOptions]) -> Self:
        """Return embeddings with some arguments changed, and connections of their own."""
        try:
            return type(self)(client=self._client.with_options(**options))
        finally:
            clear_arguments(options)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents, with the document instruction; see `KalmClient.embed`."""
        with raised_as_langchains:
            return self._client.embed_to_lists(texts, role="document")

    def embed_query(self, text: str) -> list[float]:
        """Embed a query, with the query instruction; see `KalmClient.embed`."""
        with raised_as_langchains:
            return self._client.embed_to_lists([text], role="query")[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """`embed_documents`, without blocking the running event loop or its thread pool."""
        with raised_as_langchains:
            return await self._client.aembed_to_lists(texts, role="document")

    async def aembed_query(self, text: str) -> list[float]:
        """`embed_query`, without blocking the running event loop or its thread pool."""
        with raised_as_langchains:
            return (await self._client.aembed_to_lists([text], role="query"))[0]

    def __eq__(self, other: object) -> bool:
        # LlamaIndex's Settings.embed_model first compares its value with "default". Without this
        # it would wrap this class (sequential batches of 10), ask for an unrelated package, or
        # fail an assertion without a message, depending on the installed packages.
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(other, str) and caller.startswith("llama_index."):
            raise TypeError(
                "this is the LangChain class; LlamaIndex takes the other one: "
                "`from kalm_integrations.llama_index import KalmModalEmbeddings`, with the same "
                "arguments"
            )
        return super().__eq__(other)

    __hash__ = ClientAdapter.__hash__
