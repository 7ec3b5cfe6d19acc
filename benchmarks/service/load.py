"""An open-loop HTTP load generator that costs little of the machine it shares with the service.

Requests go out at their scheduled time whether or not earlier ones were answered, as independent
users send them. A caller that has no answer by its deadline disconnects.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal, cast

Kind = Literal["query", "document"]

DOCUMENT_TEXTS: Final = 16
_BODIES: Final = 100
_TEXT: Final = (
    "the height of mountains is measured from sea level and bread rises because yeast gives off "
    "gas while rivers carry water from the hills to the sea through many countries"
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. Times are those of `time.monotonic`."""

    kind: Kind
    sent: float
    ended: float
    status: int
    """0: no answer before the deadline, or a broken connection."""
    retry_after: float | None = None

    @property
    def seconds(self) -> float:
        return self.ended - self.sent


class _Connection(asyncio.Protocol):
    """Sends a request, reads the answer's status, headers and length."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self.open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def request(self, content: bytes) -> asyncio.Future[tuple[int, bytes]]:
        self._buffer.clear()
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(content)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or self._answer is None or self._answer.done():
            return
        head = bytes(self._buffer[:end]).lower()
        length = re.search(rb"content-length: (\d+)", head)
        if length:
            whole = len(self._buffer) >= end + 4 + int(length[1])
        else:  # chunked
            whole = self._buffer.endswith(b"0\r\n\r\n")
        if whole:
            if b"connection: close" in head:
                self.open = False
            self._answer.set_result((int(head[9:12]), head))

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((0, b""))


class Caller:
    """Sends requests over a pool of connections.

    Args:
        host: Of the service.
        port: Of the service.
        key: The bearer key.
        seed: Makes texts, and arrivals, the same in each run.
    """

    def __init__(self, host: str, port: int, key: str, seed: int = 0) -> None:
        self._address = host, port
        self._key = key
        self._idle: list[_Connection] = []
        self.random = random.Random(seed)  # noqa: S311
        self._bodies: dict[Kind, list[bytes]] = {
            kind: [self._body(kind) for _ in range(_BODIES)] for kind in ("query", "document")
        }

    async def send(self, kind: Kind, deadline: float) -> Outcome:
        """Send one request and wait for its answer for at most `deadline` seconds."""
        sent = time.monotonic()
        content = self._request(kind, deadline)
        connection: _Connection | None = None
        status, head = 0, b""
        try:
            async with asyncio.timeout(deadline):
                connection = await self._connect()
                status, head = await connection.request(content)
        except (TimeoutError, OSError):
            pass
        finally:
            if connection is not None and (status == 0 or not connection.open):
                connection.transport.abort()
            elif connection is not None:
                self._idle.append(connection)
        return Outcome(kind, sent, time.monotonic(), status, _retry_after(head))

    def close(self) -> None:
        """Close all idle connections."""
        while self._idle:
            self._idle.pop().transport.abort()

    async def _connect(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(_Connection, *self._address))[1]

    def _body(self, kind: Kind) -> bytes:
        words = partial(self.random.choices, _TEXT.split(" "))
        content: object = " ".join(words(k=8))
        if kind == "document":
            content = [" ".join(words(k=50)) for _ in range(DOCUMENT_TEXTS)]
        fields = {"input": content, "input_type": kind, "encoding_format": "base64"}
        return json.dumps(fields).encode()

    def _request(self, kind: Kind, deadline: float) -> bytes:
        body = self.random.choice(self._bodies[kind])
        head = (
            "POST /v1/embeddings HTTP/1.1\r\nHost: service\r\n"
            f"Authorization: Bearer {self._key}\r\nContent-Type: application/json\r\n"
            f"X-Kalm-Timeout: {deadline}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


def _retry_after(head: bytes) -> float | None:
    exact = re.search(rb"retry-after-ms: ([\d.]+)", head)
    if exact:
        return float(exact[1]) / 1000
    whole = re.search(rb"retry-after: ([\d.]+)", head)
    return float(whole[1]) if whole else None


@dataclass
class Run:
    """The outcomes of one run, and when its load began and ended."""

    start: float = 0.0
    end: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    late: float = 0.0
    """Seconds by which the generator was behind its schedule, at worst."""
    waiting: set[asyncio.Task[None]] = field(default_factory=set)
    """Callers that were still waiting when the load ended."""

    def rate(self, kind: Kind, skip: float = 0.0) -> float:
        """Requests a second answered with 200 within their deadline, after `skip` seconds."""
        begin = self.start + skip
        good = [
            each
            for each in self.outcomes
            if each.kind == kind and each.status == 200 and begin <= each.ended <= self.end
        ]
        return len(good) / (self.end - begin)


Choose = Callable[[], Kind]


async def closed_loop(caller: Caller, choose: Choose, callers: int, seconds: float) -> Run:
    """`callers` that each send the next request when the last was answered: the capacity."""
    run = Run(start=time.monotonic())
    run.end = run.start + seconds

    async def one() -> None:
        while time.monotonic() < run.end:
            run.outcomes.append(await caller.send(choose(), 60.0))

    await asyncio.gather(*(one() for _ in range(callers)))
    return run


async def open_loop(
    caller: Caller,
    choose: Choose,
    *,
    rate: float,
    seconds: float,
    deadline: float,
    on_refusal: Callable[[Outcome], Awaitable[None]] | None = None,
) -> Run:
    """Send `rate` requests a second, at random times. Callers still waiting at the end go on
    waiting, in `Run.waiting`.

    Args:
        caller: Sends them.
        choose: The kind of each.
        rate: Requests a second.
        seconds: Length of the load.
        deadline: Seconds that each caller waits.
        on_refusal: Called with each 503.
    """
    run = Run(start=time.monotonic())
    run.end = run.start + seconds

    async def one(kind: Kind) -> None:
        outcome = await caller.send(kind, deadline)
        run.outcomes.append(outcome)
        if outcome.status == 503 and on_refusal is not None:
            await on_refusal(outcome)

    due = run.start
    while (due := due + caller.random.expovariate(rate)) < run.end:
        ahead = due - time.monotonic()
        if ahead > 0:
            await asyncio.sleep(ahead)
        else:
            run.late = max(run.late, -ahead)
        task = asyncio.create_task(one(choose()))
        run.waiting.add(task)
        task.add_done_callback(run.waiting.discard)
    return run


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
