"""An HTTP proxy on loopback that mixes up or damages responses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from loopback_server import LoopbackServer


@dataclass(frozen=True)
class Answer:
    head: bytes
    body: bytes

    def __bytes__(self) -> bytes:
        return self.head + self.body


Send = Callable[[Answer], Awaitable[None]]
Fault = Callable[["MixingProxy", Answer, Send], Awaitable[None]]


class MixingProxy(LoopbackServer):
    """Forwards each request on its own connection; `fault` sends the responses to POSTs.

    Args:
        url: Of the real server.
        fault: Called with the correct response and a function that sends one to this caller.
        missing_models: How many of the first probes of `/v1/models` get 404.
    """

    def __init__(self, url: str, fault: Fault, missing_models: int = 0) -> None:
        self._server = urlsplit(url)
        self._fault = fault
        self._missing_models = missing_models
        self.previous: Answer | None = None
        self.waiting: asyncio.Future[tuple[Answer, Send]] | None = None
        self.answers = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def send(answer: Answer) -> None:
            writer.write(bytes(answer))
            await writer.drain()

        try:
            while request := await _message(reader):
                if request.head.startswith(b"GET") and self._missing_models:
                    self._missing_models -= 1
                    await send(Answer(b"HTTP/1.1 404 -\r\nContent-Length: 0\r\n\r\n", b""))
                    continue
                answer = await self._forward(request)
                if request.head.startswith(b"POST"):
                    self.answers += 1
                    await self._fault(self, answer, send)
                else:
                    await send(answer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _forward(self, request: Answer) -> Answer:
        reader, writer = await asyncio.open_connection(self._server.hostname, self._server.port)
        writer.write(bytes(request))
        answer = await _message(reader)
        writer.close()
        assert answer is not None
        return answer


async def _message(reader: asyncio.StreamReader) -> Answer | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    return Answer(head, await reader.readexactly(int(fields.get(b"content-length", 0))))


async def swapped(proxy: MixingProxy, answer: Answer, send: Send) -> None:
    """Swap the responses of two concurrent callers."""
    waiting, proxy.waiting = proxy.waiting, None
    if waiting is not None and not waiting.done():
        waiting.set_result((answer, send))
        return
    proxy.waiting = asyncio.get_running_loop().create_future()
    try:
        other, send_other = await asyncio.wait_for(proxy.waiting, 0.2)
    except TimeoutError:  # nobody to swap with
        await send(answer)
        return
    with suppress(ConnectionError):
        await send_other(answer)
    await send(other)


async def bodies_swapped(proxy: MixingProxy, answer: Answer, send: Send) -> None:
    """Send the body of the previous response under this response's headers."""
    previous, proxy.previous = proxy.previous, answer
    if previous is not None and len(previous.body) == len(answer.body):
        answer = replace(answer, body=previous.body)
    await send(answer)


async def late_duplicate(proxy: MixingProxy, answer: Answer, send: Send) -> None:
    """Send each response twice."""
    await send(answer)
    await asyncio.sleep(0.01)
    await send(answer)


async def stale_first(proxy: MixingProxy, answer: Answer, send: Send) -> None:
    """Send the previous response before the correct one."""
    previous, proxy.previous = proxy.previous, answer
    if previous is not None:
        await send(previous)
    await send(answer)


def damaged(change: Callable[[bytes], bytes]) -> Fault:
    """Change the body of every second response."""

    async def fault(proxy: MixingProxy, answer: Answer, send: Send) -> None:
        if proxy.answers % 2:
            answer = replace(answer, body=change(answer.body))
        await send(answer)

    return fault
