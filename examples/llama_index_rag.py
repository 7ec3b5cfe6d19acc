"""RAG with LlamaIndex: index a folder of Markdown, and embed only changed files again.

python examples/llama_index_rag.py                          # this project's documentation
python examples/llama_index_rag.py ~/notes "When is bin day?" "Who has the spare key?"
"""

import sys
import tempfile
from pathlib import Path

from llama_index.core import Document, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import MarkdownNodeParser, SentenceSplitter
from llama_index.core.schema import TransformComponent

from kalm_integrations import Usage

# `kalm_integrations.KalmModalEmbeddings` is the class for LangChain.
from kalm_integrations.llama_index import KalmModalEmbeddings

FOLDER = Path(__file__).parents[1] / "docs"
QUESTIONS = ["What happens to an empty string?", "Are failed requests sent again?"]


def read(folder: Path) -> list[Document]:
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))}
    return [
        # By default, LlamaIndex embeds metadata too.
        Document(
            text=text,
            id_=name,
            metadata={"file": name},
            excluded_embed_metadata_keys=["file", "header_path"],
        )
        for name, text in texts.items()
        if text.strip()  # an empty text cannot be embedded
    ]


def open_index(storage: Path, embeddings: KalmModalEmbeddings) -> VectorStoreIndex:
    """Open the index in `storage`, or create a new one.

    Its id and folder are the fingerprint of its vectors, so another model gets another index.
    """
    index_id = storage.name
    split: list[TransformComponent] = [
        MarkdownNodeParser(),
        SentenceSplitter(chunk_size=256, chunk_overlap=0),
    ]
    if storage.exists():
        context = StorageContext.from_defaults(persist_dir=str(storage))
        index = load_index_from_storage(
            context, index_id=index_id, embed_model=embeddings, transformations=split
        )
        assert isinstance(index, VectorStoreIndex)
        return index
    index = VectorStoreIndex([], embed_model=embeddings, transformations=split)
    index.set_index_id(index_id)
    return index


def main() -> None:
    folder = Path(sys.argv[1]).expanduser() if len(sys.argv) > 1 else FOLDER
    if not folder.is_dir():
        raise SystemExit(f"{folder} is no folder")
    questions = sys.argv[2:] or QUESTIONS
    used: list[Usage] = []

    # A small model in this process, to learn with. In production, the service that you run:
    # KalmModalEmbeddings(base_url="https://...", api_key="...")
    embeddings = KalmModalEmbeddings(backend="local", truncate="end", on_usage=used.append)

    lasting = Path(tempfile.mkdtemp())  # in production, a permanent folder
    storage = lasting / embeddings.vector_identity.fingerprint
    for run in ("First run", "Second run"):
        used.clear()
        index = open_index(storage, embeddings)
        documents = read(folder)
        changed = index.refresh_ref_docs(documents)
        for gone in set(index.ref_doc_info) - {document.id_ for document in documents}:
            index.delete_ref_doc(gone, delete_from_docstore=True)
        index.storage_context.persist(str(storage))
        tokens = sum(usage.tokens or 0 for usage in used)
        print(f"{run}: {sum(changed)} of {len(changed)} files embedded, {tokens:,} tokens")

    retriever = index.as_retriever(similarity_top_k=3)
    for question in questions:
        print(f"\n{question}")
        for hit in retriever.retrieve(question):
            beginning = " ".join(hit.text.split())[:60]
            print(f"    {hit.get_score():.3f}  {hit.metadata['file']}: {beginning}")

    # MockLLM returns its prompt. In production, use for example llama_index.llms.openai's
    # OpenAI(model="gpt-5-mini"); then `str(response)` is the answer.
    response = index.as_query_engine(similarity_top_k=2, llm=MockLLM()).query(questions[0])
    prompt = str(response)
    print(
        f"\nFor {questions[0]!r} a language model would be sent, in {len(prompt):,} characters:\n"
    )
    print(prompt if len(prompt) < 600 else f"{prompt[:300]}\n    ...\n{prompt[-200:]}")


if __name__ == "__main__":
    main()
