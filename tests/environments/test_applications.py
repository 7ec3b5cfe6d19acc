"""Applications that others run: each with its real package, as docs/servers.md shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

LIMIT = 120  # seconds; a program that takes longer hangs

FASTAPI = """
from contextlib import asynccontextmanager
from fastapi import FastAPI
from fastapi.testclient import TestClient
from kalm_integrations import KalmClient

client = KalmClient(backend="local")

@asynccontextmanager
async def lifespan(app):
    await client.awarm_up()
    yield
    await client.aclose()

app = FastAPI(lifespan=lifespan)

@app.get("/embed")
async def embed(text: str) -> list[float]:
    return (await client.aembed([text], role="query")).vectors[0].tolist()

with TestClient(app) as http:
    print(len(http.get("/embed", params={"text": "K2"}).json()))
"""
STREAMLIT = """
from streamlit.testing.v1 import AppTest

page = '''
import streamlit
from kalm_integrations import KalmClient

@streamlit.cache_resource
def client():
    return KalmClient(backend="local")

text = streamlit.text_input("Text", "K2")
streamlit.write(client().embed([text]).vectors.shape[1])
'''
app = AppTest.from_string(page, default_timeout=100).run()
assert not app.exception, app.exception
app.text_input[0].set_value("another").run()
assert not app.exception, app.exception
print(app.markdown[0].value.strip("`"))
"""
TRIO = """
import trio
from kalm_integrations import KalmClient

client = KalmClient(backend="local")

async def main():
    result = await trio.to_thread.run_sync(client.embed, ["K2"])
    print(result.vectors.shape[1])

trio.run(main)
"""
ANYIO = """
import anyio
from kalm_integrations import KalmClient

client = KalmClient(backend="local")

async def main():
    result = await anyio.to_thread.run_sync(client.embed, ["K2"])
    print(result.vectors.shape[1])

anyio.run(main, backend="trio")
"""
UVLOOP = """
import uvloop
from kalm_integrations import KalmClient

client = KalmClient(backend="local")

async def main():
    print((await client.aembed(["K2"])).vectors.shape[1])

uvloop.run(main())
"""
PROGRAMS = {
    "FastAPI": FASTAPI,
    "Streamlit": STREAMLIT,
    "trio": TRIO,
    "anyio on trio": ANYIO,
    "uvloop": UVLOOP,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_application(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[name]],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["512"]


def test_celery_with_forked_workers(tmp_path: Path) -> None:
    """The parent has embedded before it forks its workers."""
    (tmp_path / "tasks.py").write_text(
        dedent("""
        from celery import Celery
        from kalm_integrations import KalmClient

        app = Celery("tasks", broker="filesystem://", backend="file://results")
        app.conf.broker_transport_options = {
            "data_folder_in": "queue", "data_folder_out": "queue", "control_folder": "control",
        }
        client = KalmClient(backend="local", timeout=100)

        @app.task
        def embed(text):
            return client.embed([text]).vectors.shape

        client.embed(["before the fork"])
        """)
    )
    for folder in ("queue", "control", "results"):
        (tmp_path / folder).mkdir()
    options = {"cwd": tmp_path, "env": os.environ | {"C_FORCE_ROOT": "1"}}
    worker = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "tasks", "worker", "--concurrency", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **options,  # type: ignore[call-overload]
    )
    code = """
from tasks import embed
jobs = [embed.delay(f"text {i}") for i in range(6)]
print([list(job.get(timeout=100)) for job in jobs] == [[1, 512]] * 6)
"""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
            **options,  # type: ignore[call-overload]
        )
        assert done.stdout == "True\n", done.stderr
        worker.terminate()
        assert worker.wait(30) == 0
    finally:
        worker.kill()
