"""A proxy on loopback that damages, loses, repeats, swaps and delays what passes."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from mixing_proxy import Answer, MixingProxy, Send, _message, late_duplicate, stale_first, swapped

STALL = 20.0  # seconds; longer than any call of the soak lasts


class ChaosProxy(MixingProxy):
    """`MixingProxy` with a fault drawn for each request.

    Args:
        url: Of the real server, which may be down.
        share: Of the requests that meet a fault.
    """

    def __init__(self, url: str, share: float) -> None:
        super().__init__(url, late_duplicate)
        self._share = share
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self._tasks: set[Any] = set()  # an event loop has weak references only

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def send(answer: Answer) -> None:
            writer.write(bytes(answer))
            await writer.drain()

        self._tasks.add(asyncio.current_task())
        try:
            while request := await _message(reader):
                self.requests += 1
                name = random.choice([*BEFORE, *AFTER]) if random.random() < self._share else ""
                self.faults.update([name] if name else [])
                if name in BEFORE:
                    await BEFORE[name](send)
                    continue
                answer = await self._forward(request)
                if request.head.startswith(b"GET") or name not in AFTER:
                    await send(answer)
                else:
                    await AFTER[name](self, answer, send)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError, AssertionError):
            pass  # the caller or the server has gone
        finally:
            writer.transport.abort()
            self._tasks.discard(asyncio.current_task())


async def _reset(*_: Any) -> None:
    raise ConnectionResetError


async def _stall(*_: Any) -> None:
    await asyncio.sleep(STALL)


def _replies(status: int, body: bytes = b"", **headers: str) -> Callable[[Send], Awaitable[None]]:
    async def reply(send: Send) -> None:
        lines = [f"HTTP/1.1 {status} -", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await send(Answer("\r\n".join([*lines, "", ""]).encode(), body))

    return reply


async def _dripped(_: Any, answer: Answer, send: Send) -> None:
    await send(replace(answer, body=b""))
    for start in range(0, len(answer.body), 512):
        await send(Answer(b"", answer.body[start : start + 512]))
        await asyncio.sleep(0.1)


async def _truncated(_: Any, answer: Answer, send: Send) -> None:
    await send(replace(answer, body=answer.body[: len(answer.body) // 2]))
    raise ConnectionResetError


async def _late(_: Any, answer: Answer, send: Send) -> None:
    await asyncio.sleep(random.uniform(0.5, 8))
    await send(answer)


async def _flipped(_: Any, answer: Answer, send: Send) -> None:
    body = bytearray(answer.body)
    body[random.randrange(len(body))] ^= 1 << random.randrange(8)
    await send(replace(answer, body=bytes(body)))


async def _mistyped(_: Any, answer: Answer, send: Send) -> None:
    head = answer.head.replace(b"application/vnd.safetensors", b"application/json")
    await send(replace(answer, head=head))


BEFORE: dict[str, Callable[..., Awaitable[None]]] = {
    "reset before": _reset,
    "stall": _stall,
    "400": _replies(400, b'{"error": {"message": "no"}}'),
    "401": _replies(401, b"no"),
    "404": _replies(404, b"<html>"),
    "413": _replies(413),
    "429": _replies(429),
    "429 with Retry-After": _replies(429, Retry_After="1"),
    "500": _replies(500, b"oops"),
    "503 with Retry-After": _replies(503, Retry_After="1"),
    "504": _replies(504, b"<title>Gateway Time-out</title>"),
    "login page": _replies(200, b"<html>", Content_Type="text/html"),
    "odd JSON": _replies(200, b'{"data": [null]}', Content_Type="application/json"),
}
AFTER: dict[str, Callable[..., Awaitable[None]]] = {
    "reset after": _reset,
    "dripped": _dripped,
    "truncated": _truncated,
    "late": _late,
    "swapped": swapped,
    "stale": stale_first,
    "duplicated": late_duplicate,
    "flipped bit": _flipped,
    "mistyped": _mistyped,
}
