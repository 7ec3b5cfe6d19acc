"""One prompt per task: what KaLM is sent for each, and which tasks can share an index.

    python examples/task_prompts.py

A query carries its task's instruction, a document usually none. So one index serves many tasks,
each with a client of its own.
"""

import numpy as np

from kalm_integrations import KalmClient

TASKS = {
    "the model's own": None,
    "web search": "web_search",
    "facts": "fact_check",
    "code": "code",
    "same question": "duplicates",  # symmetric: documents carry the instruction too
    "your own task": "Given a customer's ticket, find the article that solves it",
    "your own words": "Ticket: {text}",
}
TICKET = "Die App stürzt beim Start ab."  # The app crashes on start.
ARTICLES = [
    "If the app crashes when it starts, delete its cache and restart your phone.",
    "Invoices are sent by mail on the first day of each month.",
    "To change your password, open the settings and choose Security.",
]


def show_prompts() -> None:
    """What KaLM would be sent. Constructing a client opens nothing: no service is asked."""
    indexes: list[str] = []
    print(f"{'Task':<16} {'Index':<6} Query, and document, as the model sees them\n")
    for task, instruction in TASKS.items():
        client = KalmClient(
            backend="http",
            base_url="https://kalm.example",
            model="tencent/KaLM-Embedding-Gemma3-12B-2511",
            query_instruction=instruction,
        )
        # Equal fingerprints: vectors that may meet in one index.
        fingerprint = client.vector_identity.fingerprint
        if fingerprint not in indexes:
            indexes.append(fingerprint)
        number = indexes.index(fingerprint) + 1
        query, document = client.config.template("query"), client.config.template("document")
        print(f"{task:<16} {number:<6} {query.replace(chr(10), '⏎')}")
        print(f"{'':<16} {'':<6} {document.replace(chr(10), '⏎')}")


def search() -> None:
    """Two tasks over one index, with real vectors."""
    # A small model in this process, to learn with. It was not trained on instructions, so each
    # only blurs its queries. In production, the service that you run:
    # KalmClient(base_url="https://...", api_key="...")
    index = KalmClient(backend="local").embed(ARTICLES)
    print(f"\n{TICKET}")
    for task in ("the model's own", "your own words"):
        client = KalmClient(backend="local", query_instruction=TASKS[task])
        fits = client.vector_identity == index.identity
        scores = index.vectors @ client.embed([TICKET], role="query").vectors[0]
        best = int(np.argmax(scores))
        print(f"    {task} (fits the index: {fits}): {scores[best]:.3f}  {ARTICLES[best]}")


if __name__ == "__main__":
    show_prompts()
    search()
