"""RAG with LangChain: a handbook in four languages, and questions in four.

It splits Markdown at its headings, indexes the sections in Qdrant, and builds a grounded prompt:

    python examples/langchain_rag.py

With a chat model, it also prints answers. Any model with OpenAI's API works:

    CHAT_MODEL=gpt-5-mini OPENAI_API_KEY=... python examples/langchain_rag.py
"""

import asyncio
import os

from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_qdrant import QdrantVectorStore
from langchain_text_splitters import MarkdownHeaderTextSplitter
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, VectorParams

from kalm_integrations import KalmModalEmbeddings

HANDBOOK = """
# Arrival
The hut lies at 2,643 metres. From the valley station it is a walk of four hours on a marked path.

# Schlafen
Jeder Gast braucht einen Hüttenschlafsack aus Stoff. Decken und Kissen liegen auf den Betten.

# Repas
Le dîner est servi à dix-huit heures trente. Prévenez-nous la veille si vous êtes végétarien.

# Pago
Solo aceptamos efectivo. No hay cobertura de móvil, así que las tarjetas no funcionan aquí.

# Weather
When a thunderstorm comes near, stay inside and keep away from the metal roof of the terrace.

# Hunde
Hunde schlafen im Winterraum und müssen draußen an der Leine bleiben.
"""
QUESTIONS = [
    "Can I pay by credit card?",
    "A che ora si cena?",  # When is dinner?
    "Mag mijn hond in de slaapkamer?",  # May my dog come into the bedroom?
    "寝袋は必要ですか?",  # Do I need a sleeping bag?
]
PROMPT = ChatPromptTemplate.from_messages(
    [
        ("system", "Answer in the question's language, from these sections only; name yours."),
        ("human", "{sections}\n\nQuestion: {question}"),
    ]
)


def with_headings(sections: list[Document]) -> str:
    return "\n".join(f"[{each.metadata['heading']}] {each.page_content}" for each in sections)


def main() -> None:
    # A small model in this process, to learn with. In production, the service that you run:
    # KalmModalEmbeddings(base_url="https://...", api_key="...")
    embeddings = KalmModalEmbeddings(backend="local")

    # Another model gets another collection, because the name contains the vectors' identity.
    collection = f"handbook-{embeddings.vector_identity.fingerprint}"
    client = QdrantClient(":memory:")  # in production: QdrantClient(url="https://...")
    size = embeddings.vector_dimensions
    client.create_collection(collection, VectorParams(size=size, distance=Distance.COSINE))
    store = QdrantVectorStore(client, collection, embeddings)

    sections = MarkdownHeaderTextSplitter([("#", "heading")]).split_text(HANDBOOK)
    store.add_documents(sections)
    print(f"{len(sections)} sections in the collection {collection}\n")

    retriever = store.as_retriever(search_kwargs={"k": 2})
    chain = {"sections": retriever | with_headings, "question": RunnablePassthrough()} | PROMPT

    found = asyncio.run(retriever.abatch(QUESTIONS))  # all at once
    for question, (best, second) in zip(QUESTIONS, found, strict=True):
        headings = f"{best.metadata['heading']}, then {second.metadata['heading']}"
        print(f"{question}\n    found: {headings}")

    if name := os.environ.get("CHAT_MODEL"):
        from langchain_openai import ChatOpenAI

        answers = (chain | ChatOpenAI(model=name) | StrOutputParser()).batch(QUESTIONS)
        for question, answer in zip(QUESTIONS, answers, strict=True):
            print(f"\n{question}\n    {answer}")
    else:
        print("\nNo CHAT_MODEL is set. This is what one would be sent for the first question:\n")
        print(chain.invoke(QUESTIONS[0]).to_string())


if __name__ == "__main__":
    main()
