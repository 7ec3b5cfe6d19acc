"""Applications that others run: the snippets of docs/environments.md, with the real packages."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import nbformat
import numpy as np
import pytest
from notebooks import executed
from scripted import vector_of
from serving import FaultyServer, Received, reply
from snippets import LIMIT, LOCAL, SNIPPETS

JUPYTER = """
from kalm_integrations import KalmClient

client = KalmClient()
documents = client.embed(["K2 is 8,611 metres high."])
query = await client.aembed(["How tall is K2?"], role="query")
print(documents.vectors @ query.vectors[0])
"""
FASTAPI = (
    SNIPPETS["FastAPI"]
    + """
from fastapi.testclient import TestClient

with TestClient(app) as http:
    print(len(http.get("/embed", params={"text": "K2"}).json()))
"""
)
STREAMLIT = f"""
import json
from streamlit.testing.v1 import AppTest

app = AppTest.from_string({SNIPPETS["Streamlit"]!r}, default_timeout=100).run()
assert not app.exception, app.exception
app.text_input[0].set_value("another").run()
assert not app.exception, app.exception
print(len(json.loads(app.json[0].value)))
"""
TRIO = """
import trio
from kalm_integrations import KalmClient

client = KalmClient()

async def main():
    result = await trio.to_thread.run_sync(client.embed, ["K2"])
    print(result.vectors.shape[1])

trio.run(main)
"""
ANYIO = """
import anyio
from kalm_integrations import KalmClient

client = KalmClient()

async def main():
    result = await anyio.to_thread.run_sync(client.embed, ["K2"])
    print(result.vectors.shape[1])

anyio.run(main, backend="trio")
"""
UVLOOP = """
import uvloop
from kalm_integrations import KalmClient

client = KalmClient()

async def main():
    print((await client.aembed(["K2"])).vectors.shape[1])

uvloop.run(main())
"""
NEST_ASYNCIO = """
import asyncio
import nest_asyncio
from kalm_integrations import KalmClient

nest_asyncio.apply()
client = KalmClient()

async def main():
    return asyncio.run(client.aembed(["K2"])).vectors.shape == client.embed(["K2"]).vectors.shape

print([512, 0][not all(asyncio.run(main()) for _ in range(3))])
"""
PROGRAMS = {
    "FastAPI": FASTAPI,
    "Streamlit": STREAMLIT,
    "trio": TRIO,
    "anyio on trio": ANYIO,
    "uvloop": UVLOOP,
    "nest_asyncio": NEST_ASYNCIO,
}


def run(source: str, **options: Any) -> str:
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        **{"env": os.environ | LOCAL, **options},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", PROGRAMS)
def test_application(name: str) -> None:
    assert run(PROGRAMS[name]) == "512"


def test_jupyter() -> None:
    cell = nbformat.v4.new_code_cell(JUPYTER)
    ran = executed(nbformat.v4.new_notebook(cells=[cell]), LOCAL)
    assert re.fullmatch(r"\[0\.\d+\]\n", ran.cells[0].outputs[0].text)


def test_celery_with_forked_workers(tmp_path: Path) -> None:
    """The parent has embedded before it forks its workers."""
    (tmp_path / "tasks.py").write_text(
        SNIPPETS["Celery"]
        + """
app.conf.broker_transport_options = {
    "data_folder_in": "queue", "data_folder_out": "queue", "control_folder": "control",
}
client.embed(["before the fork"])
"""
    )
    for folder in ("queue", "control", "results"):
        (tmp_path / folder).mkdir()
    broker = {"CELERY_BROKER_URL": "filesystem://", "CELERY_RESULT_BACKEND": "file://results"}
    environment = os.environ | LOCAL | broker | {"C_FORCE_ROOT": "1", "KALM_TIMEOUT": "100"}
    worker = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "tasks", "worker", "--concurrency", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        env=environment,
    )
    code = """
from tasks import embed
jobs = [embed.delay(f"text {i}") for i in range(6)]
print([len(job.get(timeout=100)) for job in jobs] == [512] * 6)"""
    try:
        assert run(code, cwd=tmp_path, env=environment) == "True"
        worker.terminate()
        assert worker.wait(30) == 0
    finally:
        worker.kill()


@dataclass
class RuntimeAPI(FaultyServer):
    """What AWS Lambda's runtime client asks for events, and tells results."""

    events: Queue[dict[str, str]] = field(default_factory=Queue)
    results: Queue[Any] = field(default_factory=Queue)

    async def _respond(self, request: Received, writer: Any) -> None:
        if request.method == "POST":
            self.results.put((request.path.rpartition("/")[2], json.loads(request.body)))
            await reply(202, "{}")(request, writer)
            return
        event = await self._loop.run_in_executor(None, self.events.get)
        names = {"Lambda_Runtime_Aws_Request_Id": "1", "Lambda_Runtime_Deadline_Ms": "9" * 13}
        await reply(200, json.dumps(event), **names)(request, writer)


CLOSED: dict[str, Callable[[Any], None]] = {
    "stays open": lambda writer: None,
    "closed": lambda writer: writer.close(),
    "reset": lambda writer: writer.transport.abort(),
}


@pytest.mark.parametrize("name", CLOSED)
def test_aws_lambda_freezes_the_process_between_two_calls(name: str, tmp_path: Path) -> None:
    (tmp_path / "function.py").write_text(SNIPPETS["AWS Lambda"])

    async def close(writers: list[Any]) -> None:
        for writer in writers:
            CLOSED[name](writer)

    with FaultyServer(ours=False) as service, RuntimeAPI() as runtime:
        environment = {
            "AWS_LAMBDA_RUNTIME_API": runtime.url.removeprefix("http://"),
            "KALM_BASE_URL": service.url,
            "KALM_MODEL": "kalm",
        }
        command = [sys.executable, "-m", "awslambdaric", "function.handler"]
        function = subprocess.Popen(command, cwd=tmp_path, env=environment)
        try:
            for number in range(3):
                runtime.events.put({"query": f"text {number}"})
                kind, result = runtime.results.get(timeout=LIMIT)
                assert kind == "response", result
                text = service.posted[-1].texts[0]
                assert text.endswith(f"text {number}")
                assert np.allclose(result["vector"], vector_of(text, "float32"), atol=1e-3)
                function.send_signal(signal.SIGSTOP)
                asyncio.run_coroutine_threadsafe(close(service.writers), service._loop).result()
                function.send_signal(signal.SIGCONT)
            assert (len(service.writers) > 1) == (name != "stays open")
        finally:
            function.kill()
            function.wait()
            runtime.events.put({})
