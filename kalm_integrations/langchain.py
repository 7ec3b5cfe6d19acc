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

from kalm_integrations.client import KalmClient
from kalm_integrations.langchain_errors import raised_as_langchains


class KalmModalEmbeddings(KalmClient, Embeddings):
    """KaLM, or the embedded engine, as a LangChain embedding model.

    Takes the arguments of `ClientConfig`, and is a `KalmClient` too: `iter_embed`, `warm_up`,
    `cache_namespace` and the rest are there. The errors of the four methods below are LangChain's
    `ModelError`s too (`langchain_errors`).

    Example:
        >>> embeddings = KalmModalEmbeddings(backend="local")
        >>> len(embeddings.embed_query("How tall is K2?"))
        512
    """

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed texts to be found, with the document instruction; see `KalmClient.embed`."""
        with raised_as_langchains():
            return self._embed_to_lists(texts, "document")

    def embed_query(self, text: str) -> list[float]:
        """Embed a question, with the query instruction; see `KalmClient.embed`."""
        with raised_as_langchains():
            return self._embed_to_lists([text], "query")[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """`embed_documents`, without blocking the running event loop or its thread pool."""
        with raised_as_langchains():
            return await self._aembed_to_lists(texts, "document")

    async def aembed_query(self, text: str) -> list[float]:
        """`embed_query`, without blocking the running event loop or its thread pool."""
        with raised_as_langchains():
            return (await self._aembed_to_lists([text], "query"))[0]

    def __eq__(self, other: object) -> bool:
        # LlamaIndex's Settings.embed_model first compares what it is given with "default". Left
        # alone, it goes on to wrap this class (sequential batches of 10), to ask for an unrelated
        # package, or to fail an assertion without a word, as installed packages have it.
        if isinstance(other, str) and other == "default":
            raise TypeError(
                "this is the LangChain class; LlamaIndex takes the other one: "
                "`from kalm_integrations.llama_index import KalmModalEmbeddings`, with the same "
                "arguments"
            )
        return super().__eq__(other)

    __hash__ = KalmClient.__hash__
