"""The corpus in a vector store of each framework. Its vectors are kept between runs."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from langchain_qdrant import QdrantVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, VectorParams

from kalm_integrations import langchain, llama_index
from kalm_integrations.client import KalmClient
from kalm_integrations.quickstart.corpus import Corpus, Hit, Text

_TOP: Final = 3
_COLLECTION: Final = "quickstart"


class LangChainIndex:
    """Qdrant in this process's memory, through LangChain."""

    def __init__(self, client: KalmClient, texts: Sequence[Text], vectors: Any) -> None:
        qdrant = QdrantClient(":memory:")
        size = VectorParams(size=vectors.shape[1], distance=Distance.COSINE)
        qdrant.create_collection(_COLLECTION, size)
        payload = [{"page_content": t.content, "metadata": {"name": t.name}} for t in texts]
        qdrant.upload_collection(_COLLECTION, vectors, payload=payload)
        embeddings = langchain.KalmModalEmbeddings(client=client)
        self._store = QdrantVectorStore(qdrant, _COLLECTION, embeddings)

    def search(self, question: str) -> list[Hit]:
        """The best hits, the best first."""
        matches = self._store.similarity_search_with_score(question, k=_TOP)
        return [Hit(match.metadata["name"], match.page_content, score) for match, score in matches]


class LlamaIndexIndex:
    """LlamaIndex's own vector store."""

    def __init__(self, client: KalmClient, texts: Sequence[Text], vectors: Any) -> None:
        nodes = [
            TextNode(text=text.content, metadata={"name": text.name}, embedding=vector.tolist())
            for text, vector in zip(texts, vectors, strict=True)
        ]
        embeddings = llama_index.KalmModalEmbeddings(client=client)
        self._index = VectorStoreIndex(nodes, embed_model=embeddings)

    def search(self, question: str) -> list[Hit]:
        """The best hits, the best first."""
        matches = self._index.as_retriever(similarity_top_k=_TOP).retrieve(question)
        return [Hit(match.metadata["name"], match.text, match.get_score()) for match in matches]


FRAMEWORKS: Final[dict[str, type[LangChainIndex | LlamaIndexIndex]]] = {
    "LangChain (QdrantVectorStore)": LangChainIndex,
    "LlamaIndex (VectorStoreIndex)": LlamaIndexIndex,
}


def open_client() -> KalmClient:
    """A client of the embedded engine, which both frameworks share."""
    return KalmClient(backend="local", truncate="end", show_progress=False)


def vectors_of(client: KalmClient, corpus: Corpus) -> tuple[Any, str]:
    """The vectors of the corpus's texts, of shape (texts, dimensions), and where they are from.

    One file for each corpus keeps them; it is replaced when the texts have changed.
    """
    digest = hashlib.sha256(client.cache_namespace.encode())
    for text in corpus.texts:
        digest.update(text.content.encode(errors="surrogatepass") + b"\0")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kalm-integrations"
    name = hashlib.sha256(corpus.source.encode(errors="surrogateescape")).hexdigest()[:16]
    path = cache / f"quickstart-{name}.npz"
    try:
        with np.load(path) as kept:
            if str(kept["digest"]) == digest.hexdigest():
                return kept["vectors"], f"kept from an earlier run, in {path}"
    except (OSError, ValueError, KeyError, EOFError):
        pass  # none, or unreadable: it is written anew
    started = time.perf_counter()
    vectors = client.embed([text.content for text in corpus.texts]).vectors
    seconds = time.perf_counter() - started
    origin = f"embedded in {seconds:.1f} s, {len(vectors) / seconds:,.0f} texts/s"
    temporary = path.with_suffix(f".{os.getpid()}.npz")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, vectors=vectors, digest=digest.hexdigest())
        temporary.replace(path)
    except OSError:
        return vectors, f"{origin}; {cache} cannot be written, so they are not kept"
    return vectors, f"{origin}; kept for the next question"
