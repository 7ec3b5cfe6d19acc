"""The corpus in two frameworks: each embeds the texts itself, as an app has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from langchain_qdrant import QdrantVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, VectorParams

from kalm_integrations import langchain, llama_index
from kalm_integrations.identity import VectorIdentity
from kalm_integrations.quickstart.corpus import Text

TOP: Final = 3
_COLLECTION: Final = "quickstart"


@dataclass(frozen=True, slots=True)
class Hit:
    """A text that was found, as the framework gave it back."""

    name: str
    content: str
    score: float


class Index(Protocol):
    """A vector store of one framework.

    Attributes:
        framework: Its name.
        store: The name of the class that keeps the vectors.
    """

    framework: str
    store: str

    def add(self, texts: Sequence[Text]) -> None:
        """Embed and keep `texts`."""
        ...

    def search(self, question: str) -> list[Hit]:
        """The best `TOP` hits, the best first."""
        ...


class LangChainIndex:
    """Qdrant in this process's memory, through LangChain."""

    framework = "LangChain"
    store = "QdrantVectorStore"

    def __init__(self, embeddings: langchain.KalmModalEmbeddings) -> None:
        client = QdrantClient(":memory:")
        size = embeddings.vector_dimensions
        client.create_collection(_COLLECTION, VectorParams(size=size, distance=Distance.COSINE))
        self._store = QdrantVectorStore(client, _COLLECTION, embeddings)

    def add(self, texts: Sequence[Text]) -> None:
        self._store.add_texts(
            [text.content for text in texts], [{"name": text.name} for text in texts]
        )

    def search(self, question: str) -> list[Hit]:
        found = self._store.similarity_search_with_score(question, k=TOP)
        return [Hit(hit.metadata["name"], hit.page_content, score) for hit, score in found]


class LlamaIndexIndex:
    """LlamaIndex's own vector store."""

    framework = "LlamaIndex"
    store = "VectorStoreIndex"

    def __init__(self, embeddings: llama_index.KalmModalEmbeddings) -> None:
        self._index = VectorStoreIndex([], embed_model=embeddings)

    def add(self, texts: Sequence[Text]) -> None:
        # LlamaIndex embeds metadata too, unless told not to.
        self._index.insert_nodes(
            [
                TextNode(
                    text=text.content,
                    metadata={"name": text.name},
                    excluded_embed_metadata_keys=["name"],
                )
                for text in texts
            ]
        )

    def search(self, question: str) -> list[Hit]:
        found = self._index.as_retriever(similarity_top_k=TOP).retrieve(question)
        return [Hit(hit.metadata["name"], hit.text, hit.get_score()) for hit in found]


def open_indexes() -> tuple[VectorIdentity, list[Index]]:
    """Load the engine; what it says it is, and an empty index of each framework.

    Raises:
        KalmError: The engine cannot be loaded.
    """
    for_langchain = langchain.KalmModalEmbeddings(backend="local", truncate="end")
    for_llama_index = llama_index.KalmModalEmbeddings(backend="local", truncate="end")
    identity = for_langchain.warm_up()
    return identity, [LangChainIndex(for_langchain), LlamaIndexIndex(for_llama_index)]
