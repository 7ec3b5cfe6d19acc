"""Programs that embed, each in its own interpreter, and the service that they use.

A program must exit in time with status 0, an empty stderr and no process left. After that, the
service must have no connection and no request left.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent
from typing import Any

import numpy as np
import psutil
from pydantic import SecretStr
from scripted import vectors_of
from serving import serving

from kalm_integrations import KalmClient
from kalm_integrations.models import EMBEDDED
from modal_backend.engines.base import EngineOutput
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.http.server import ServerOptions
from modal_backend.service import EmbeddingService

LIMIT = 60  # seconds; a program that takes longer hangs
SOON = 10  # less than the 15 after which aiohttp closes what is idle, and more than it takes
KEY = "correct-horse"
TEXTS = [f"text {number}" for number in range(20)]

PREAMBLE = """
import asyncio, atexit, gc, multiprocessing, os, signal, sys, threading, time
import numpy
from kalm_integrations import KalmClient, session

session.COLD_START_HINT = 3600  # a busy machine is no cold start
signal.signal(signal.SIGINT, signal.default_int_handler)  # who started us may ignore it
client = KalmClient()
expected = numpy.load(os.environ["EXPECTED"])

def is_of(vector, number):
    return bool(numpy.allclose(vector, expected[number], atol=1e-3))

def right(number):
    return is_of(client.embed([f"text {number}"]).vectors[0], number)

def fork(work):
    pid = os.fork()
    if pid == 0:
        sys.exit(not work())
    return pid

def ended_well(pid):
    return os.waitpid(pid, 0)[1] == 0

def threads():
    return sorted(thread.name for thread in threading.enumerate())
"""
# All warnings are errors, those among them that -X dev gives for what is left open; but for
# the one that says that a fork with threads, the very case here, may go wrong.
FLAGS = ["-u", "-X", "dev", "-W", "error", "-W", "ignore:This process:DeprecationWarning"]


@dataclass
class Program:
    """A running program."""

    process: subprocess.Popen[str]

    def line(self) -> str:
        """The next line that it prints; empty if it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self) -> None:
        """Write a line to its stdin, for which it waits."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def wait_until(self, condition: Callable[[], bool], limit: float = LIMIT) -> None:
        """Wait for a condition that must become true before it exits."""
        assert eventually(lambda: condition() or self.process.poll() is not None, limit)
        assert condition(), self.process.communicate()

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def finish(self) -> list[str]:
        """The rest of its output; it must exit with status 0 and an empty stderr."""
        out, err = self.process.communicate()
        # asyncio's debug mode reports the program's own loops when the machine is slow.
        err = re.sub(r"Executing <.* took \d\.\d+ seconds\n", "", err)
        assert (self.process.returncode, err) == (0, ""), f"{out}\n{err}"
        return out.splitlines()


@dataclass
class Service:
    """The service of programs: in their own process, or a server in the test's process."""

    environment: dict[str, str]
    port: int = 0
    peers: list[int] = field(default_factory=list)
    """The client's port of each request: one number per connection."""
    waiting: list[str] = field(default_factory=list)
    """Texts "never ..." of the requests in progress."""

    def run(self, code: str) -> list[str]:
        """The lines that a program prints."""
        with self.start(code) as program:
            return program.finish()

    @contextmanager
    def start(self, code: str) -> Iterator[Program]:
        """Start a program; it must have ended when the block does."""
        with self.start_command([*FLAGS, "-c", PREAMBLE + dedent(code)]) as program:
            yield program

    @contextmanager
    def start_command(self, arguments: Sequence[str | Path], **options: Any) -> Iterator[Program]:
        """Start python with any arguments."""
        with subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        ) as process:
            watchdog = threading.Timer(LIMIT, _end, [process.pid])
            watchdog.start()
            try:
                yield Program(process)
                process.wait(LIMIT)
                assert eventually(lambda: not _living(process.pid)), "a process is left"
                self.assert_left_alone()
            finally:
                watchdog.cancel()
                _end(process.pid)

    def assert_left_alone(self) -> None:
        assert eventually(lambda: not self.connections()), "a connection is left"
        assert eventually(lambda: not self.waiting), "a request is left"

    def connections(self) -> int:
        """Number of connections of the server, half closed ones included."""
        sockets = psutil.Process().net_connections("tcp") if self.port else []
        ours = [each for each in sockets if each.laddr.port == self.port]
        return sum(each.status != psutil.CONN_LISTEN for each in ours)


@contextmanager
def local() -> Iterator[Service]:
    """The embedded engine."""
    client = KalmClient(backend="local")
    with _expecting(client.embed(TEXTS).vectors) as expected:
        yield Service({"KALM_BACKEND": "local"} | expected)
    client.close()


@contextmanager
def over_http(host: str = "127.0.0.1", **options: Any) -> Iterator[Service]:
    """A real server, with vectors that are a function of their text."""
    service = Service({"KALM_MODEL": EMBEDDED.space.model, "KALM_API_KEY": KEY})
    app = create_app(EmbeddingService(_Engine(service)), keys=BearerKeys([SecretStr(KEY)]))

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            service.peers.append(scope["client"][1])
        await app(scope, receive, send)

    with (
        serving(watched, ServerOptions(keep_alive=3600), **options) as url,
        _expecting(vectors_of(TEXTS)) as expected,
    ):
        service.port = int(url.rpartition(":")[2])
        service.environment |= {"KALM_BASE_URL": url.replace("127.0.0.1", host)} | expected
        yield service


def services(kind: str) -> Any:
    """`local` or `over_http`, by name."""
    return {"local": local, "http": over_http}[kind]()


def eventually(condition: Callable[[], bool], limit: float = LIMIT) -> bool:
    """Whether `condition` becomes true in time."""
    until = time.monotonic() + limit
    while not (true := condition()) and time.monotonic() < until:
        time.sleep(0.02)
    return true


class _Engine:
    """Responds immediately; for texts "never ...", not at all."""

    identity = EMBEDDED.space
    dimensions = (512,)
    max_tokens = 8192
    query_template = "{text}"

    def __init__(self, service: Service) -> None:
        self._service = service

    async def embed(self, texts: Sequence[str], **_: Any) -> EngineOutput:
        never = [text for text in texts if text.startswith("never")]
        if never:
            self._service.waiting += never
            try:
                await asyncio.sleep(3600)
            finally:
                for text in never:
                    self._service.waiting.remove(text)
        return EngineOutput(vectors_of(texts, "float32"), len(texts))

    async def close(self) -> None: ...


@contextmanager
def _expecting(vectors: np.ndarray[Any, Any]) -> Iterator[dict[str, str]]:
    with TemporaryDirectory() as folder:
        path = Path(folder, "expected.npy")
        np.save(path, vectors)
        yield {"EXPECTED": str(path)}


def _living(session: int) -> list[int]:
    pids = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                pids.append(process.pid)
    return pids


def _end(session: int) -> None:
    for pid in _living(session):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
