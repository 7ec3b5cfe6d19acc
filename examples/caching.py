"""Embed each text only once: LangChain's cache on disk, for documents and queries.

python examples/caching.py          # simulates two runs, in a temporary folder
python examples/caching.py ./cache  # keeps the cache: start it twice
"""

import sys
import tempfile
from pathlib import Path

from langchain_classic.embeddings import CacheBackedEmbeddings
from langchain_classic.storage import LocalFileStore
from langchain_core.vectorstores import InMemoryVectorStore

from kalm_integrations import KalmModalEmbeddings, Usage

RECIPES = [
    "For a loaf of bread, mix flour with water, salt and yeast, and let the dough rest a day.",
    "Die Zwiebeln in Butter glasig dünsten, mit Brühe aufgießen und mit Käse überbacken.",
    "Coupez les pommes en fines tranches et disposez-les sur la pâte sucrée.",
    "Machaca el aguacate con limón, cebolla y cilantro, y sírvelo con tortillas.",
]
QUESTIONS = ["How do I bake bread?", "apple tart", "guacamole"]


def cached(embeddings: KalmModalEmbeddings, folder: Path) -> CacheBackedEmbeddings:
    """Add a cache for each role, because a text has one vector as document and one as query.

    The namespace contains everything that vectors depend on. Another model or instruction gets
    another cache.
    """
    return CacheBackedEmbeddings.from_bytes_store(
        embeddings,
        LocalFileStore(folder / embeddings.cache_namespace),
        query_embedding_cache=LocalFileStore(folder / embeddings.query_cache_namespace),
        key_encoder="sha256",
        batch_size=2048,  # if a call fails, its finished batches are in the cache
    )


def app(folder: Path, instruction: str | None = None) -> None:
    """Index the recipes, search for the questions, and print the usage."""
    used: list[Usage] = []
    # A small model in this process, to learn with. In production, the service that you run:
    # KalmModalEmbeddings(base_url="https://...", api_key="...")
    embeddings = KalmModalEmbeddings(
        backend="local", query_instruction=instruction, on_usage=used.append
    )
    store = InMemoryVectorStore(cached(embeddings, folder))
    store.add_texts(RECIPES)
    best = [store.similarity_search(question, k=1)[0].page_content for question in QUESTIONS]
    requests, tokens = sum(u.requests for u in used), sum(u.tokens or 0 for u in used)
    print(f"    {requests} requests, {tokens} tokens")
    for question, text in zip(QUESTIONS, best, strict=True):
        print(f"    {question:<21} {text[:60]} ...")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    print(f"First run, with {sum(path.is_file() for path in folder.rglob('*'))} vectors on disk")
    app(folder)
    print("Second run: all from the disk")
    app(folder)
    print("Another query instruction: the documents' cache still serves")
    app(folder, "Search for a recipe: {text}")


if __name__ == "__main__":
    main()
