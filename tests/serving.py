"""Real HTTP servers on loopback: ours under uvicorn, and one with faults that a test chooses."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from loopback_server import LoopbackServer
from scripted import vector_of, vectors_of

from kalm_integrations.codec import MEDIA_TYPE, pack
from kalm_integrations.models import EMBEDDED
from kalm_integrations.protocol import EmbedRequest, EmbedResponse
from kalm_integrations.result import Usage
from kalm_integrations.transports.openai_server import SHORT_TEXT
from modal_backend.engines.embedded import EmbeddedEngine
from modal_backend.http.server import HttpServer, ServerOptions, bind


@cache
def embedded_engine() -> EmbeddedEngine:
    """The real embedded engine. Loading takes seconds, so the tests of a process share one."""
    return EmbeddedEngine.load()


@contextmanager
def serving(app: Any, server_options: ServerOptions | None = None, **options: Any) -> Iterator[str]:
    """Serve an ASGI app on a free port of loopback, as `kalm serve` does; yields its base URL."""
    server = HttpServer(
        app, bind("127.0.0.1", 0), server_options or ServerOptions(), log_level="warning", **options
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield server.address
    finally:
        server.should_exit = True
        thread.join()


def ready_url(process: subprocess.Popen[str]) -> str:
    """The URL of a `kalm serve` whose stderr is a pipe, once it is ready."""
    assert process.stderr is not None
    shown = ""
    for line in process.stderr:
        shown += line
        if ready := re.search(r"ready: .* on (http://\S+)", line):
            return ready[1]
    raise AssertionError(shown)


@dataclass
class Received:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def texts(self) -> list[str]:
        return list(json.loads(self.body)["input"])

    @property
    def is_short_text(self) -> bool:
        """Whether this finds out what a server accepts."""
        return self.method == "POST" and self.texts == [SHORT_TEXT]


Step = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]
"""Responds to one request, or fails to."""


@dataclass
class FaultyServer(LoopbackServer):
    """A server that responds to `/v1/embeddings` with its steps, and then correctly.

    The short text that a client sends to find out what a server accepts takes no step.

    Args:
        steps: For the first, second, ... request to `/v1/embeddings`.
        ours: Whether it responds as our server, or as any with OpenAI's API.
    """

    steps: Iterable[Step | None] = ()
    ours: bool = True
    received: list[Received] = field(default_factory=list, repr=False)
    """The response to a GET after a redirect is that to the POST before it."""
    writers: list[asyncio.StreamWriter] = field(default_factory=list, repr=False)
    """One for each connection."""

    @property
    def posted(self) -> list[Received]:
        """What was sent to `/v1/embeddings`, without the short text that comes before."""
        return [each for each in self.received if each.method == "POST" and not each.is_short_text]

    def __post_init__(self) -> None:
        self._steps = iter(self.steps)
        self._tasks: set[asyncio.Task[Any]] = set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.writers.append(writer)
        try:
            while request := await _read_request(reader):
                self.received.append(request)
                await self._respond(request, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _respond(self, request: Received, writer: asyncio.StreamWriter) -> None:
        if request.path.endswith("/models"):
            described = {"id": EMBEDDED.space.model, "object": "model"}
            if self.ours:
                described["identity"] = EMBEDDED.space.to_dict()  # type: ignore[assignment]
            await reply(200, json.dumps({"data": [described]}))(request, writer)
            return
        if request.is_short_text:
            await plain()(request, writer)
            return
        step = next(self._steps, None)
        if request.method == "GET":
            request = self.posted[-1]
        await (step or (packed() if self.ours else plain()))(request, writer)


async def _read_request(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode().strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Received(method, path, headers, body)


def reply(
    status: int, body: str | bytes = "", content_type: str = "application/json", **headers: str
) -> Step:
    """Any response."""
    content = body.encode() if isinstance(body, str) else body
    fields = {"Content-Type": content_type, "Content-Length": str(len(content))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = f"HTTP/1.1 {status} -\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items())

    async def step(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head.encode() + b"\r\n" + content)
        await writer.drain()

    return step


def packed(change: Callable[[EmbedResponse], EmbedResponse] = lambda answer: answer) -> Step:
    """Our server's response, changed."""

    async def step(request: Received, writer: asyncio.StreamWriter) -> None:
        fields = json.loads(request.body)
        dtype = fields["embed_dtype"]
        read = EmbedRequest(
            texts=request.texts,
            role=fields["priority"],
            dimensions=fields.get("dimensions"),
            truncate=fields["truncate"],
        )
        answer = EmbedResponse(
            vectors=vectors_of(request.texts, dtype).astype(dtype),
            identity=EMBEDDED.space,
            usage=Usage(len(request.texts), 1),
            digest=read.digest(),
        )
        await reply(200, pack(change(answer)), MEDIA_TYPE)(request, writer)

    return step


def plain(change: Callable[[dict[str, Any]], Any] = lambda content: content) -> Step:
    """An OpenAI-compatible server's response, changed."""

    async def step(request: Received, writer: asyncio.StreamWriter) -> None:
        content = {
            "object": "list",
            "model": json.loads(request.body)["model"],
            "data": [
                {"index": i, "embedding": base64.b64encode(vector_of(text, "<f4")).decode()}
                for i, text in enumerate(request.texts)
            ],
            "usage": {"prompt_tokens": len(request.texts)},
        }
        changed = change(content)
        await reply(200, json.dumps(content if changed is None else changed))(request, writer)

    return step


async def reset(_: Received, writer: asyncio.StreamWriter) -> None:
    """Break the connection without an answer."""
    writer.transport.abort()


def cut_off(after: int) -> Step:
    """Break the connection after `after` bytes of the right answer."""

    async def step(request: Received, writer: asyncio.StreamWriter) -> None:
        whole = _Recorder()
        await packed()(request, whole)  # type: ignore[arg-type]
        writer.write(whole.content[:after])
        await writer.drain()
        writer.transport.abort() if after == 0 else writer.close()

    return step


async def stall(_: Received, writer: asyncio.StreamWriter) -> None:
    """Never answer."""
    await asyncio.sleep(60)


async def drip(request: Received, writer: asyncio.StreamWriter) -> None:
    """The right answer, ten bytes at a time, for ever."""
    whole = _Recorder()
    await packed()(request, whole)  # type: ignore[arg-type]
    for start in range(0, len(whole.content), 10):
        writer.write(whole.content[start : start + 10])
        await writer.drain()
        await asyncio.sleep(0.05)


class _Recorder:
    """A writer that keeps what is written."""

    def __init__(self) -> None:
        self.content = b""

    def write(self, data: bytes) -> None:
        self.content += data

    async def drain(self) -> None: ...
