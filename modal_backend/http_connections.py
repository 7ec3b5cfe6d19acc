"""Connections of the HTTP server: their deadlines, and which of them is closed when there are too
many.

uvicorn bounds neither the number of connections nor the time in which a request has to arrive.
Hypercorn and Granian bound some of the times, but neither keeps descriptors in reserve, and neither
can tell which connections have presented a valid key; so this subclass of uvicorn's protocol
adds what is missing. httptools rather than h11, because h11 needs 40 % more processor time for a
query; the one thing that httptools gets wrong, `Upgrade`, is corrected here.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from kalm_integrations.errors import ServiceUnavailableError
from modal_backend.openai_schema import render_error

HEADER_BYTES: Final = 65_536
HEADER_SECONDS: Final = 10.0
BODY_SECONDS: Final = 300.0
STALLED_SECONDS: Final = 60.0
"""A caller who reads nothing of an answer for this long is disconnected."""

_BATCH: Final = 32
_CHECK_SECONDS: Final = 0.05
_STRANGERS_A_SECOND: Final = 1_000
"""Connections without a valid key that may come and go in a second. It decides how long each of
them has to send a request before it may have to make room: longer where there is more room."""
_IDLE: Final = 5.0
"""The same for one that has presented a key: it may be about to send its next request."""


def _answer(status: int, fields: str, body: bytes) -> bytes:
    head = f"connection: close\r\n{fields}content-length: {len(body)}\r\n\r\n"
    return STATUS_LINE[status] + head.encode() + body


_NO_ROOM: Final = _answer(
    503,
    "content-type: application/json\r\nretry-after: 1\r\n",
    render_error(ServiceUnavailableError("the server has too many connections.", 1.0)),
)


@dataclass(slots=True)
class Closed:
    """Connections closed since the last line of the log about them.

    Attributes:
        for_room: To make room for others.
        late: Because a header or body did not arrive in time, or an answer was not read.
    """

    for_room: int = 0
    late: int = 0


class ConnectionTable:
    """All open connections, and how to make room for one more.

    Args:
        limit: Most connections at a time.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.connecting = 0
        """Accepted, but not in the table yet."""
        self.closing_after_answers = False
        """Whether every answer ends its connection, because there is no room."""
        self.stopping = False
        """Whether it does because the server stops."""
        self.closed = Closed()
        # In order of age in this state; the values are not used.
        self._strangers: dict[Connection, None] = {}
        self._busy: dict[Connection, None] = {}
        self._idle: dict[Connection, None] = {}
        self._leaving: dict[Connection, None] = {}
        self._freed = asyncio.Event()

    def __len__(self) -> int:
        groups = (self._strangers, self._busy, self._idle, self._leaving)
        return self.connecting + sum(map(len, groups))

    def connections(self) -> list[Connection]:
        """All but those that are being closed."""
        return [*self._strangers, *self._busy, *self._idle]

    def add(self, connection: Connection) -> None:
        """Take in a new connection."""
        self._move(connection, self._strangers)

    def requested(self, connection: Connection) -> None:
        """It has sent a request, whose key is not checked yet."""
        self._move(connection, self._strangers)

    def answered(self, connection: Connection) -> None:
        """Its request has been answered, and it waits for the next one."""
        self._move(connection, self._idle if connection.authorized else self._strangers)

    def remove(self, connection: Connection) -> None:
        """It is closed."""
        connection.group.pop(connection, None)
        self._freed.set()

    def abort(self, connection: Connection) -> None:
        """Close it at once, whatever is still to be sent."""
        self._move(connection, self._leaving)
        connection.transport.abort()

    async def room(self) -> None:
        """Wait until one more connection may be accepted.

        Connections without a valid key are closed for it, the oldest first; then those that have
        been idle for a while. While all are busy, their answers end them.
        """
        while len(self) >= self.limit:
            for _ in range(3):  # whatever has arrived is read, and its key checked
                await asyncio.sleep(0)
            self._freed.clear()
            if not self._make_room():
                self.close_after_answers()
            try:
                await asyncio.wait_for(self._freed.wait(), _CHECK_SECONDS)
            except TimeoutError:
                continue
        self.closing_after_answers = False

    async def empty(self) -> None:
        """Wait until all connections are closed."""
        while self.connections():
            self._freed.clear()
            await self._freed.wait()

    def _make_room(self) -> bool:
        now = asyncio.get_running_loop().time()
        patience = min(self.limit / _STRANGERS_A_SECOND, HEADER_SECONDS)
        chosen: list[Connection] = []
        for connection in list(self._strangers):
            if connection.since + patience > now or len(chosen) == _BATCH:
                break
            if connection.authorized:
                self._move(connection, self._busy)
            else:
                chosen.append(connection)
        if not chosen:
            chosen = [one for one in islice(self._idle, 1) if one.since + _IDLE < now]
        for connection in chosen:
            if (
                not connection.has_requested
            ):  # an answer to the request that it may be about to send
                connection.transport.write(_NO_ROOM)
            self.abort(connection)
        self.closed.for_room += len(chosen)
        return bool(chosen)

    def close_after_answers(self) -> None:
        """Have every answer end its connection, until there is room again."""
        if not self.closing_after_answers:
            self.closing_after_answers = True
            for connection in self.connections():
                connection.close_after_answer()

    def _move(self, connection: Connection, group: dict[Connection, None]) -> None:
        connection.group.pop(connection, None)
        connection.group = group
        connection.since = connection.loop.time()
        group[connection] = None


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with deadlines and a bound on the header. `Upgrade` is ignored, as HTTP
    allows, instead of breaking a request that has a body (Java's client offers h2c so)."""

    def __init__(self, *args: Any, table: ConnectionTable, **options: Any) -> None:
        super().__init__(*args, **options)
        self._table = table
        self.group: dict[Connection, None] = {}
        """Where the table has it."""
        self.has_requested = False
        """Whether it has sent a complete header."""
        self.since = 0.0
        """When it got there; seconds of the event loop's clock, as all times here."""
        self._deadline = math.inf
        self._write_deadline = math.inf
        self._in_header = False
        self._in_body = False
        self._header_bytes = 0

    @property
    def authorized(self) -> bool:
        """Whether the newest request has presented a valid key."""
        return self.scope is not None and bool(self.scope["state"].get("authorized"))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._table.add(self)
        self._deadline = self.loop.time() + HEADER_SECONDS

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn forgets it where there was an error
        self._table.remove(self)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                rest = data[upgrade.args[0] :]
                if self.parser.get_method() == b"CONNECT" or self._answering:
                    raise httptools.HttpParserError from None
                self.parser = httptools.HttpRequestParser(self)
                self.parser.feed_data(self._header_without_upgrade() + rest)
        # Not logged, since anybody can send as many as they like.
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._refuse(400, "This is not a valid HTTP request.")
        if self._in_header:
            self._header_bytes += len(data)
            if self._header_bytes > HEADER_BYTES:
                self._refuse(431, f"The header has over {HEADER_BYTES} bytes.")

    def _should_upgrade(self) -> bool:
        """Keeps uvicorn from starting a request whose header `data_received` parses again."""
        return True

    def _header_without_upgrade(self) -> bytes:
        fields = [field for field in self.scope["headers"] if field[0] != b"upgrade"]
        version = self.scope["http_version"].encode()
        lines = [b"%s %s HTTP/%s" % (self.scope["method"].encode(), self.url, version)]
        lines += [b"%s: %s" % field for field in fields]
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_header = True
        self._header_bytes = 0
        self._deadline = self.loop.time() + HEADER_SECONDS

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.parser.should_upgrade():
            return
        self.has_requested = True
        self._in_header = False
        self._in_body = True
        self._deadline = self.loop.time() + BODY_SECONDS
        self._table.requested(self)
        if self._table.closing_after_answers or self._table.stopping:
            self.close_after_answer()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self.parser.should_upgrade():
            return
        self._in_body = False
        self._deadline = math.inf
        if self.cycle.response_complete:
            self._wait_for_next()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._deadline = self.loop.time() + STALLED_SECONDS
            return
        if self._answering:  # the next request, which had arrived before
            return
        if not self._in_body:
            self._wait_for_next()
        elif not self.authorized:
            self._deadline = min(self._deadline, self.loop.time() + HEADER_SECONDS)
        self._table.answered(self)

    def _wait_for_next(self) -> None:
        self._deadline = self.loop.time() + self.timeout_keep_alive + 1

    def close_after_answer(self) -> None:
        """Have the answer say that the connection ends with it, if it has not begun."""
        cycle = self.cycle
        if cycle is not None and cycle.keep_alive and not cycle.response_started:
            cycle.keep_alive = False
            cycle.default_headers = [*cycle.default_headers, (b"connection", b"close")]

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline = self.loop.time() + STALLED_SECONDS

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_deadline = math.inf

    def check_deadlines(self, now: float) -> None:
        """End the connection if it is late."""
        closing = self.transport.is_closing()
        if self._write_deadline < now or (closing and self._deadline < now):
            self._table.closed.late += 1
            self._table.abort(self)
        elif self._deadline < now and not self.flow.read_paused:
            self._table.closed.late += 1
            self._deadline = now + STALLED_SECONDS
            if self._in_body and not self.cycle.response_started:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
                self._refuse(408, f"The body did not arrive within {BODY_SECONDS:.0f} s.")
            else:
                self.transport.close()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, reason: str) -> None:
        """Answer what is no complete request, and close the connection."""
        if self.transport.is_closing():
            return
        if not self._answering or (self._in_body and not self.cycle.response_started):
            answer = _answer(status, "content-type: text/plain\r\n", reason.encode())
            self.transport.write(answer)
        self._deadline = self.loop.time() + STALLED_SECONDS
        self.transport.close()
