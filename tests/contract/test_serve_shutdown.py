"""`kalm serve`: shutdown, and logs that cannot be written."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

# A request with three texts takes longer, unless the engine's process ends.
SLOW = """
import asyncio, sys
from multiprocessing.connection import wait
from modal_backend.engines.embedded_process import ProcessEngine
run = ProcessEngine._run
async def slow(self, long, chunk):
    if len(chunk.texts) == 3:
        await asyncio.to_thread(wait, [self._process.sentinel], {seconds})
    return await run(self, long, chunk)
ProcessEngine._run = slow
sys.exit(__import__("kalm_integrations.cli").cli.main(sys.argv[1:]))
"""
HEADERS = {"Authorization": "Bearer k"}
THREE = json.dumps({"input": ["a", "b", "c"]})


class Served:
    def __init__(self, process: subprocess.Popen[Any], port: int) -> None:
        self.process = process
        self.port = port

    def connect(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=60)

    def call(
        self, path: str, body: str | None = None, connection: HTTPConnection | None = None
    ) -> tuple[int, Any]:
        """Status and headers."""
        if connection is None:
            with closing(self.connect()) as connection:
                return self.call(path, body, connection)
        connection.request("GET" if body is None else "POST", path, body, HEADERS)
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.headers

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ready(self) -> bool:
        with suppress(OSError):
            return self.call("/ready")[0] == 200
        return False

    def computing(self) -> bool:
        with closing(self.connect()) as connection:
            connection.request("GET", "/metrics", headers=HEADERS)
            page = connection.getresponse().read().decode()
        return 'kalm_texts_in_progress{role="document"} 3.0' in page


@contextmanager
def serving(
    *options: str, seconds: float = 0, wrapper: Sequence[str] = (), **streams: Any
) -> Iterator[Served]:
    """`kalm serve` in which a request with three texts takes so long.

    Args:
        options: Of `kalm serve`.
        seconds: How long such a request takes.
        wrapper: A command that runs the command after it.
        streams: Standard streams of the process.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            *wrapper,
            sys.executable,
            "-c",
            SLOW.format(seconds=seconds),
            "serve",
            "--port",
            f"{port}",
            *options,
        ],
        env=os.environ | {"KALM_API_KEY": "k"},
        **streams,
    )
    served = Served(process, port)
    try:
        served.wait_for(served.ready)
        yield served
    finally:
        process.kill()
        process.wait()


class Call(threading.Thread):
    """A request in progress."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self._served = served
        self.answer: tuple[int, Any] = (0, {})
        self.start()

    def run(self) -> None:
        with suppress(OSError):
            self.answer = self._served.call("/v1/embeddings", THREE)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_requests_in_progress_finish_and_new_ones_are_refused(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        serving("--grace", "60", seconds=3, stdout=output, stderr=output) as served,
        closing(served.connect()) as kept,
    ):
        assert served.call("/ready", connection=kept)[0] == 200
        call = Call(served)
        served.wait_for(served.computing)
        served.process.send_signal(number)
        served.wait_for(lambda: served.call("/ready")[0] == 503)
        refused, headers = served.call("/v1/embeddings", THREE, connection=kept)
        assert (refused, headers["Connection"]) == (503, "close")
        assert int(headers["Retry-After"]) > 0
        assert served.call("/health")[0] == 200
        call.join()
        assert (call.answer[0], call.answer[1]["Connection"]) == (200, "close")
        assert served.process.wait(30) == status
    assert "Traceback" not in log.read_text()


def test_after_the_grace_period_unfinished_requests_get_503(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        serving("--grace", "1", seconds=600, stdout=output, stderr=output) as served,
    ):
        call = Call(served)
        served.wait_for(served.computing)
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as upload:
            upload.sendall(
                b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n"
                b"Content-Length: 100000\r\n\r\n{"
            )
            assert served.call("/ready")[0] == 200  # the header has been read by then
            served.process.terminate()
            with upload.makefile("rb") as file:
                head = file.read().lower()
        assert head.startswith(b"http/1.1 503")
        assert b"retry-after:" in head
        call.join()
        assert call.answer[0] == 503
        assert int(call.answer[1]["Retry-After"]) > 0
        assert served.process.wait(60) == 143  # though the computation goes on
    assert "Traceback" not in log.read_text()


def test_a_second_signal_ends_it_at_once() -> None:
    with serving("--grace", "600", seconds=600, stderr=subprocess.DEVNULL) as served:
        Call(served)
        served.wait_for(served.computing)
        served.process.terminate()
        served.wait_for(lambda: served.call("/ready")[0] == 503)
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(60) == 130


def full_pipe() -> tuple[int, int]:
    """A pipe that takes no more; the end to read and the end to write."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x")
    os.set_blocking(writing, True)
    return reading, writing


@pytest.mark.parametrize("kind", ["a full pipe", "a full disk", "closed", "broken"])
def test_it_serves_although_its_log_cannot_be_written(kind: str) -> None:
    reading, writing = full_pipe()
    streams: dict[str, Any] = {"stdout": writing, "stderr": writing}
    wrapper: tuple[str, ...] = ()
    if kind == "a full disk":
        full = os.open("/dev/full", os.O_WRONLY)
        os.close(writing)
        writing = full
        streams = {"stdout": writing, "stderr": writing}
    elif kind == "closed":
        wrapper = ("sh", "-c", 'exec "$@" >&- 2>&-', "sh")
    elif kind == "broken":
        os.close(reading)
    try:
        with serving(wrapper=wrapper, **streams) as served, closing(served.connect()) as kept:
            statuses = {served.call("/v1/embeddings", '{"input": "a"}', kept)[0] for _ in range(50)}
            # Requests that are logged as warnings, with the log of the whole package.
            refused = served.call("/v1/embeddings", "{", kept)[0]
            assert (statuses, refused) == ({200}, 400)
            served.process.terminate()
            assert served.process.wait(60) == 143
    finally:
        with suppress(OSError):
            os.close(reading)
        os.close(writing)
