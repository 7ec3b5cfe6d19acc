"""All connections of the HTTP server: which of them is closed when there are too many."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from kalm_integrations.errors import ServiceUnavailableError
from modal_backend.http.schema import render_error

if TYPE_CHECKING:
    from modal_backend.http.connections import Connection

_BATCH: Final = 32
_CHECK_SECONDS: Final = 0.05
_STRANGERS_A_SECOND: Final = 1_000
"""Connections without a valid key that may come and go in a second. It decides how long each of
them has to send a request before it may have to make room: longer where there is more room."""
_MOST_PATIENCE: Final = 10.0
_IDLE: Final = 5.0
"""The same for one that has presented a key: it may be about to send its next request."""


def last_answer(status: int, fields: str, body: bytes) -> bytes:
    """The bytes of an answer that ends its connection; `fields` are further header lines."""
    head = f"connection: close\r\n{fields}content-length: {len(body)}\r\n\r\n"
    return STATUS_LINE[status] + head.encode() + body


_NO_ROOM: Final = last_answer(
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
        patience = min(self.limit / _STRANGERS_A_SECOND, _MOST_PATIENCE)
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
            # An answer to the request that it may be about to send.
            if not connection.has_requested and not connection.refused:
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
