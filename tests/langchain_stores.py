"""LangChain's vector stores as the contract tests use them: opened from disk with the settings of
docs/langchain.md, filled with facts, indexed by record managers, and read by a second process.

Run as a script, this is the second process: `python tests/langchain_stores.py FOLDER [TEXT ...]`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from langchain_chroma import Chroma
from langchain_classic.indexes import SQLRecordManager
from langchain_core.documents import Document
from langchain_core.indexing import RecordManager, index
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_qdrant import QdrantVectorStore
from qdrant_client import QdrantClient, models
from scripted import ScriptedTransport

from kalm_integrations import KalmModalEmbeddings

with warnings.catch_warnings():
    # langchain-community, the home of LangChain's FAISS, says on import that it is no longer
    # maintained; and faiss, from Python 3.12 on, that its generated types name no module.
    warnings.filterwarnings("ignore", "`langchain-community` is being", DeprecationWarning)
    warnings.filterwarnings("ignore", "builtin type .* has no __module__", DeprecationWarning)
    import faiss
    from langchain_community.docstore.in_memory import InMemoryDocstore
    from langchain_community.vectorstores import FAISS
    from langchain_community.vectorstores.utils import DistanceStrategy

# chromadb says this of every collection that it reads the settings of, unless its own embedding
# function is in use.
quiet_chroma = pytest.mark.filterwarnings("ignore:legacy embedding function:DeprecationWarning")

FACTS = [
    "K2 is 8,611 metres high.",
    "The Nile flows through eleven countries.",
    "Bread rises because yeast gives off gas.",
    "The heart has four chambers.",
    "A solar eclipse needs a new moon.",
]
QUESTIONS = ["How tall is the mountain?", "Warum geht Brot auf?", "Which river is long?"]
ANSWERS = [FACTS[0], FACTS[2], FACTS[1]]

SECRETS = {"api_key": "hunter2", "modal_key": "hunter3", "modal_secret": "hunter4"}

SCRIPT = __file__
"""What the second process runs."""

INNER_PRODUCT: dict[str, Any] = {
    "distance_strategy": DistanceStrategy.MAX_INNER_PRODUCT,
    "relevance_score_fn": lambda cosine: (1 + cosine) / 2,
}


def name_of(embeddings: KalmModalEmbeddings) -> str:
    return f"facts-{embeddings.vector_identity.fingerprint}"


def open_chroma(folder: Path, embeddings: KalmModalEmbeddings) -> Chroma:
    return Chroma(
        name_of(embeddings),
        embeddings,
        persist_directory=str(folder),
        collection_configuration={"hnsw": {"space": "cosine"}},
        collection_metadata={"kalm": json.dumps(embeddings.vector_identity.to_dict())},
    )


def open_qdrant(folder: Path, embeddings: KalmModalEmbeddings) -> QdrantVectorStore:
    client = QdrantClient(path=str(folder))
    if not client.collection_exists(name_of(embeddings)):
        client.create_collection(
            name_of(embeddings),
            models.VectorParams(
                size=embeddings.vector_identity.dimensions, distance=models.Distance.COSINE
            ),
            metadata={"kalm": embeddings.vector_identity.to_dict()},
        )
    return QdrantVectorStore(
        client, name_of(embeddings), embeddings, validate_collection_config=False
    )


def open_faiss(folder: Path, embeddings: KalmModalEmbeddings) -> FAISS:
    place = folder / name_of(embeddings)
    if place.exists():
        return FAISS.load_local(
            str(place), embeddings, allow_dangerous_deserialization=True, **INNER_PRODUCT
        )
    empty = faiss.IndexFlatIP(embeddings.vector_identity.dimensions)
    return FAISS(embeddings, empty, InMemoryDocstore(), {}, **INNER_PRODUCT)


def open_in_memory(folder: Path, embeddings: KalmModalEmbeddings) -> InMemoryVectorStore:
    place = folder / name_of(embeddings)
    if place.exists():
        return InMemoryVectorStore.load(str(place), embeddings)
    return InMemoryVectorStore(embeddings)


STORES: dict[str, Callable[[Path, KalmModalEmbeddings], VectorStore]] = {
    "chroma": open_chroma,
    "qdrant": open_qdrant,
    "faiss": open_faiss,
    "in memory": open_in_memory,
}


@pytest.fixture(name="kind", params=STORES)
def every_kind(request: pytest.FixtureRequest) -> str:
    """The `kind` of the tests of a module that imports this."""
    return str(request.param)


@contextmanager
def opened(kind: str, folder: Path, embeddings: KalmModalEmbeddings) -> Iterator[VectorStore]:
    """The store on disk: made if it is not there, saved in the end."""
    store = STORES[kind](folder, embeddings)
    yield store
    if isinstance(store, FAISS):
        store.save_local(str(folder / name_of(embeddings)))
    if isinstance(store, InMemoryVectorStore):
        store.dump(str(folder / name_of(embeddings)))
    if isinstance(store, QdrantVectorStore):
        store.client.close()  # it locks the folder


def hits(store: VectorStore) -> list[list[tuple[str, float]]]:
    """The three hits of each question, with their cosines."""
    return [
        [
            (document.page_content, float(1 - score if isinstance(store, Chroma) else score))
            for document, score in store.similarity_search_with_score(question, k=3)
        ]
        for question in QUESTIONS
    ]


def key_of(document: Document) -> str:
    """A UUID, the only text that Qdrant takes for an id."""
    content = json.dumps([document.page_content, document.metadata], sort_keys=True)
    return str(uuid.UUID(hashlib.sha256(content.encode()).hexdigest()[:32]))


def index_all(
    documents: Iterable[Document], records: RecordManager, store: VectorStore, **options: Any
) -> dict[str, int]:
    """(added, skipped, deleted) of one run that leaves `documents` in the store and no others."""
    result = index(documents, records, store, cleanup="full", key_encoder=key_of, **options)
    return {what: n for what, n in result.items() if n}  # type: ignore[misc]


def documents_sent(transport: ScriptedTransport) -> list[str]:
    requests = [request for request in transport.requests if request.role == "document"]
    return [text for request in requests for text in request.texts]


@contextmanager
def sql_records(folder: Path, namespace: str) -> Iterator[SQLRecordManager]:
    records = SQLRecordManager(namespace, db_url=f"sqlite:///{folder}/records.db")
    records.create_schema()
    yield records
    records.engine.dispose()


def documents_of(texts: Iterable[str]) -> list[Document]:
    return [Document(text, metadata={"source": "facts"}) for text in texts]


def index_in_chroma(
    folder: Path, embeddings: KalmModalEmbeddings, texts: Iterable[str]
) -> dict[str, int]:
    """One run over what lies in the folder, records and vectors."""
    with opened("chroma", folder, embeddings) as store:
        with sql_records(folder, name_of(embeddings)) as records:
            return index_all(documents_of(texts), records, store)


def secrets_in(*payloads: object) -> list[str]:
    shown = "".join(map(str, payloads)) + repr(payloads) + json.dumps(payloads, default=str)
    return [secret for secret in SECRETS.values() if secret in shown]


def second_process(*arguments: object, **environment: str) -> Any:
    """What a Python process of its own prints: of SCRIPT, or of -c and code."""
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)} | environment,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def main(folder: Path, *texts: str) -> Any:
    """The second process; settings are in its environment."""
    embeddings = KalmModalEmbeddings()
    if texts:
        return index_in_chroma(folder, embeddings, texts)
    found = {}
    for kind in STORES:
        with opened(kind, folder / kind, embeddings) as store:
            found[kind] = hits(store)
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *sys.argv[2:])))
