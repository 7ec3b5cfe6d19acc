"""One prompt for each task: what KaLM gets, and which tasks can share an index.

    python examples/task_prompts.py

Queries get their task's instruction, documents usually get none. So many tasks can share one index.
Each task needs its own client.
"""

import numpy as np

from kalm_integrations import KalmClient

TASKS = {
    "the model's own": None,
    "web search": "web_search",
    "facts": "fact_check",
    "code": "code",
    "same question": "duplicates",  # documents get the instruction too
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
    """Print what KaLM would get. A new client opens no connection."""
    indexes: list[str] = []
    print(f"{'Task':<16} {'Index':<6} Query, and document, as the model sees them\n")
    for task, instruction in TASKS.items():
        client = KalmClient(
            backend="http",
            base_url="https://kalm.example",
            model="tencent/KaLM-Embedding-Gemma3-12B-2511",
            query_instruction=instruction,
        )
        # Clients with equal fingerprints can share an index.
        fingerprint = client.vector_identity.fingerprint
        if fingerprint not in indexes:
            indexes.append(fingerprint)
        number = indexes.index(fingerprint) + 1
        query, document = client.config.template("query"), client.config.template("document")
        print(f"{task:<16} {number:<6} {query.replace(chr(10), '⏎')}")
        print(f"{'':<16} {'':<6} {document.replace(chr(10), '⏎')}")


def search() -> None:
    """Search one index for two tasks, with real vectors."""
    # A small model in this process, to learn with. It was not trained on instructions, so they
    # make its results worse. In production, the service that you run:
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
