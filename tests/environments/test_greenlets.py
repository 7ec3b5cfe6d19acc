"""gevent and eventlet, whatever they have patched, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import pytest
from snippets import LIMIT, LOCAL

APPLICATION = """
import json
from wsgiref.types import StartResponse, WSGIEnvironment

from kalm_integrations import KalmClient

client = KalmClient()


def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    vectors = client.embed_to_lists([environ["QUERY_STRING"]], role="query")
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(vectors[0]).encode()]
"""
PROGRAM = """
import asyncio, os, sys
def patch():
    from gevent import monkey
    monkey.patch_all({options})
if "{when}" == "before the import": patch()
from kalm_integrations import KalmClient
if "{when}" == "after the import": patch()
client = KalmClient(backend="local", timeout=60)
if "{when}" == "after the first call":
    client.embed(["first"])
    patch()
import gevent

ticks = 0
def tick():
    global ticks
    while True:
        gevent.sleep(0.001)
        ticks += 1
ticking = gevent.spawn(tick)
client.warm_up()

def embed(text):
    return client.embed([text]).vectors.shape == (1, 512)
async def aembed():
    await client.awarm_up()
    results = await asyncio.gather(*(client.aembed([f"async {{i}}"]) for i in range(5)))
    return all(result.vectors.shape == (1, 512) for result in results)

beside = [gevent.spawn(embed, f"text {{i}}") for i in range(20)]
print("asyncio.run", asyncio.run(aembed()))
gevent.joinall(beside)
print("greenlets", all(job.value for job in beside))
print("thread pool", gevent.get_hub().threadpool.apply(embed, ("in a pool",)))
print("long texts", client.embed(["long text " * 2000] * 2).vectors.shape == (2, 512))
print("others ran", ticks > 0)
try:
    with gevent.Timeout(0.001):
        client.embed(["word " * 3000])
except gevent.Timeout:
    print("gevent.Timeout True")
child = os.fork()
if child == 0:
    sys.exit(not embed("child"))
print("fork", os.waitpid(child, 0)[1] == 0)
client.close()
print("after close", embed("again"))
ticking.kill()
"""
CASES = {
    "all, before the import": ("before the import", ""),
    "all, after the import": ("after the import", ""),
    "all, after the first call": ("after the first call", ""),
    "no threads": ("before the import", "thread=False"),
    "no sockets": ("before the import", "socket=False"),
}

FLAGS = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]


def run(source: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *FLAGS, "-c", dedent(source), *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("case", CASES)
def test_gevent(case: str) -> None:
    when, options = CASES[case]
    lines = run(PROGRAM.format(when=when, options=options)).splitlines()
    assert len(lines) == 8
    assert all(line.endswith(" True") for line in lines), lines


def test_gevent_over_http_ends_at_the_timeout() -> None:
    """The server accepts connections and never responds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        source = """
            import sys, time
            from gevent import monkey; monkey.patch_all()
            import gevent
            from kalm_integrations import KalmClient
            from kalm_integrations.errors import DeadlineExceededError
            client = KalmClient(base_url=sys.argv[1], timeout=1)
            def call():
                try:
                    client.embed(["never"])
                except DeadlineExceededError:
                    return True
            jobs = [gevent.spawn(call) for _ in range(5)]
            gevent.joinall(jobs)
            print([job.value for job in jobs])
        """
        assert run(source, url) == "[True, True, True, True, True]\n"


@pytest.mark.parametrize("options", ["", "thread=False", "socket=False"])
def test_eventlet_is_refused_at_once(options: str) -> None:
    out = run(f"""
        import os, warnings
        os.environ["EVENTLET_NO_GREENDNS"] = "yes"
        warnings.simplefilter("ignore")  # eventlet announces its end
        import eventlet
        eventlet.monkey_patch({options})
        from kalm_integrations import KalmClient
        from kalm_integrations.errors import ConfigurationError
        try:
            KalmClient(backend="local").embed(["text"])
        except ConfigurationError as error:
            print("eventlet" in str(error) and "gevent" in str(error))
    """)
    assert out == "True\n"


def test_modals_client_is_refused_at_once_where_threads_are_patched() -> None:
    out = run("""
        from gevent import monkey; monkey.patch_all()
        from kalm_integrations import KalmClient
        from kalm_integrations.errors import ConfigurationError
        try:
            KalmClient(backend="modal").embed(["text"])
        except ConfigurationError as error:
            print("gevent" in str(error) and "base_url" in str(error))
    """)
    assert out == "True\n"


@pytest.mark.parametrize("preload", [[], ["--preload"]])
def test_gunicorn_with_gevent_workers(preload: list[str], tmp_path: Path) -> None:
    """With --preload, the engine has embedded before the fork."""
    before = '\nclient.embed(["before the workers"])\n'
    (tmp_path / "app.py").write_text(APPLICATION + before)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port, fd = listening.getsockname()[1], listening.fileno()
        command = f"-m gunicorn -k gevent --workers 2 --timeout 100 --bind fd://{fd} app:app"
        command += " --graceful-timeout 5"
        process = subprocess.Popen(
            [sys.executable, *command.split(), *preload],
            cwd=tmp_path,
            env=os.environ | LOCAL | {"KALM_TIMEOUT": "100"},
            pass_fds=[fd],
            stderr=subprocess.PIPE,
            text=True,
        )

        def query(number: int) -> int:
            url = f"http://127.0.0.1:{port}/?text{number}"
            with urllib.request.urlopen(url, timeout=LIMIT) as response:
                return len(json.load(response))

        try:
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(query, range(40)))
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert answers == [512] * 40
    assert process.returncode == 0
    assert "Traceback" not in err
