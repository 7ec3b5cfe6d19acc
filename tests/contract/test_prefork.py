"""Real servers that fork their workers after the app has embedded in the master process."""

from __future__ import annotations

import json
import signal
import socket
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import TEXTS, Program, Service
from scripted import vector_of

SHARED = """
import json, os
from urllib.parse import parse_qs
from kalm_integrations import KalmModalEmbeddings

embeddings = KalmModalEmbeddings()

def answer(vector):
    return json.dumps({"process": os.getpid(), "vector": vector}).encode()
"""
WSGI = """
embeddings.embed_query("in the master")

def app(environ, start_response):
    [text] = parse_qs(environ["QUERY_STRING"])["text"]
    start_response("200 OK", [("Content-Type", "application/json")])
    return [answer(embeddings.embed_query(text))]
"""
ASGI = """
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    [text] = parse_qs(scope["query_string"].decode())["text"]
    vector = await embeddings.aembed_query(text)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": answer(vector)})
"""
GUNICORN = "gunicorn --preload --workers 2 --bind fd://{fd} app:app"
SERVERS = {
    "gunicorn": (WSGI, GUNICORN),
    "gunicorn, with threads, its workers replaced": (
        WSGI,
        GUNICORN + " --threads 4 --max-requests 5",
    ),
    "uvicorn": (ASGI, "uvicorn --workers 2 --fd {fd} app:app"),
}


@pytest.mark.parametrize("name", SERVERS)
def test_workers_return_the_right_vectors_and_end_with_the_server(
    http: Service, tmp_path: Path, name: str
) -> None:
    app, command = SERVERS[name]
    (tmp_path / "app.py").write_text(SHARED + app)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        fd = listening.fileno()
        arguments = ["-m", *command.format(fd=fd).split()]
        with http.start_command(arguments, cwd=tmp_path, pass_fds=[fd]) as program:
            workers = workers_of(listening.getsockname()[1], program)
            assert program.process.pid not in workers
            program.process.send_signal(signal.SIGTERM)
            out, err = program.process.communicate()
            assert program.process.returncode in (0, -signal.SIGTERM), err
            assert "Traceback" not in out + err
            assert "Warning" not in out + err


def workers_of(port: int, program: Program) -> set[int]:
    """The processes that responded, at least two."""

    def query(text: str) -> int:
        url = f"http://127.0.0.1:{port}/?text={text.replace(' ', '+')}"
        with urllib.request.urlopen(url, timeout=30) as response:
            content: Any = json.load(response)
        assert np.allclose(content["vector"], vector_of(text, "float32"), atol=1e-3)
        return int(content["process"])

    workers: set[int] = set()

    def two_responded() -> bool:
        with ThreadPoolExecutor(8) as pool:
            workers.update(pool.map(query, TEXTS))
        return len(workers) >= 2

    program.wait_until(two_responded)
    return workers
