"""The `openai` client with `kalm serve`.

    python examples/openai_client.py
    KALM_BASE_URL=https://... KALM_API_KEY=... python examples/openai_client.py

The first command starts `kalm serve` on a free port, and stops it at the end.
"""

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
from openai import BadRequestError, OpenAI

TEXTS = [
    "Die Zugspitze ist der höchste Berg Deutschlands.",
    "Le Rhin prend sa source dans les Alpes suisses.",
    "The Baltic Sea is only about a tenth as salty as the ocean.",
]
QUESTION = "Which mountain is the tallest?"


@contextmanager
def service() -> Generator[tuple[str, str]]:
    """Yield the URL and key of the service; start one if `KALM_BASE_URL` is not set."""
    if url := os.environ.get("KALM_BASE_URL"):
        yield url, os.environ.get("KALM_API_KEY", "")
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    key = secrets.token_hex(32)
    print(f"KALM_BASE_URL is not set: starting `kalm serve --port {port}`, with a small model\n")
    command = [sys.executable, "-m", "kalm_integrations.cli", "serve", "--port", str(port)]
    environment = os.environ | {"KALM_API_KEY": key}
    server = subprocess.Popen(command, env=environment, stdout=sys.stderr)  # its log
    try:
        yield f"http://127.0.0.1:{port}", key
    finally:
        server.terminate()
        server.wait()


def show(client: OpenAI) -> None:
    model = client.models.list().data[0].id

    # `input_type` is our addition: it applies the model's template for documents or queries.
    # Without it, texts are embedded unchanged.
    documents = client.embeddings.create(
        model=model, input=TEXTS, extra_body={"input_type": "document"}
    )
    query = client.embeddings.with_raw_response.create(
        model=model, input=QUESTION, extra_body={"input_type": "query"}
    )
    vectors = np.array([item.embedding for item in documents.data])
    scores = vectors @ np.array(query.parse().data[0].embedding)

    print(f"{model}, {vectors.shape[1]} dimensions, {documents.usage.total_tokens} tokens")
    print(f"Space of these vectors: {query.headers['x-kalm-identity']}; keep it with your index\n")
    print(QUESTION)
    for row in np.argsort(-scores):
        print(f"    {scores[row]:.3f}  {TEXTS[row]}")

    try:
        client.embeddings.create(model=model, input=["fine", ""])
    except BadRequestError as error:
        print(f"\nA text that cannot be embedded is named: {error.code}, {error.body}")


def main() -> None:
    with service() as (url, key):
        base_url = url.rstrip("/").removesuffix("/v1") + "/v1"
        # The service may still be starting, so allow more retries.
        with OpenAI(base_url=base_url, api_key=key, max_retries=10) as client:
            show(client)


if __name__ == "__main__":
    main()
