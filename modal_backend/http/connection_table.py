"""All connections of the HTTP server, and which of them are closed when there are too many."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from kalm_integrations.errors import ServiceUnavailableError
from modal_backend.http.responses import ErrorResponse

if TYPE_CHECKING:
    from modal_backend.http.connections import Connection

_MAX_EVICTED_AT_ONCE: Final = 32
_CHECK_SECONDS: Final = 0.05
_UNAUTHORIZED_PER_SECOND: Final = 1_000
"""Connections without a valid key that may come and go in a second. It determines how long each of
them may take to send a request before it can be closed: the higher the limit, the longer."""
_MAX_UNAUTHORIZED_SECONDS: Final = 10.0
_IDLE_SECONDS: Final = 5.0
"""How long a connection with a valid key has to be idle: it may be about to send a request."""


def final_response(status: int, fields: str, body: bytes) -> bytes:
    """The bytes of a response that ends its connection; `fields` are additional header lines."""
    head = f"connection: close\r\n{fields}content-length: {len(body)}\r\n\r\n"
    return STATUS_LINE[status] + head.encode() + body


_SERVER_FULL: Final = final_response(
    503,
    "content-type: application/json\r\nretry-after: 1\r\n",
    bytes(ErrorResponse(ServiceUnavailableError("the server has too many connections.", 1.0)).body),
)


class ConnectionTable:
    """All open connections, at most `limit` of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.connecting = 0
        """Connections that were accepted but are not in the table yet."""
        self.draining = False
        """Whether every connection ends with its response, because there are too many."""
        self.stopping = False
        """Whether it does because the server is stopping."""
        self.evicted = 0
        """Connections closed to make room, since these two were last logged."""
        self.timed_out = 0
        """Connections closed because of a deadline."""
        self.connections: set[Connection] = set()
        # Both in the order of `Connection.since`; the values are not used. What is in neither has a
        # request with a valid key in progress, or is being closed.
        self._unauthorized: dict[Connection, None] = {}
        self._idle: dict[Connection, None] = {}
        self._removed = asyncio.Event()

    def __len__(self) -> int:
        return self.connecting + len(self.connections)

    def update(self, connection: Connection) -> None:
        """List a connection whose `since` is now: it was opened, has sent a header or has got a
        response."""
        self._unlist(connection)
        self.connections.add(connection)
        # The key of a request that has just arrived is not checked yet.
        listed = self._idle if connection.authorized else self._unauthorized
        listed[connection] = None

    def remove(self, connection: Connection) -> None:
        """Remove a connection that has ended."""
        self._unlist(connection)
        self.connections.discard(connection)
        self._removed.set()

    def _unlist(self, connection: Connection) -> None:
        self._unauthorized.pop(connection, None)
        self._idle.pop(connection, None)

    async def wait_for_capacity(self) -> None:
        """Wait until one more connection may be accepted.

        Connections without a valid key are closed for it, the oldest first; then one that has been
        idle for a while. While all are busy, they end with their responses.
        """
        while len(self) >= self.limit:
            for _ in range(3):  # let received requests be read, and their keys checked
                await asyncio.sleep(0)
            self._removed.clear()
            if not self._evict():
                self._drain()
            try:
                await asyncio.wait_for(self._removed.wait(), _CHECK_SECONDS)
            except TimeoutError:
                continue
        self.draining = False

    async def wait_until_empty(self) -> None:
        """Wait until all connections are closed."""
        while self.connections:
            self._removed.clear()
            await self._removed.wait()

    def _drain(self) -> None:
        """End every connection with its response, until there is room again."""
        if not self.draining:
            self.draining = True
            for connection in self.connections:
                connection.close_after_response()

    def _evict(self) -> bool:
        """Close connections to make room for others. Returns whether there were any to close."""
        now = asyncio.get_running_loop().time()
        patience = min(self.limit / _UNAUTHORIZED_PER_SECOND, _MAX_UNAUTHORIZED_SECONDS)
        evicted: list[Connection] = []
        for connection in list(self._unauthorized):
            if connection.since + patience > now or len(evicted) == _MAX_EVICTED_AT_ONCE:
                break
            if connection.authorized:  # its key has been checked since then
                self._unlist(connection)
            else:
                evicted.append(connection)
        if not evicted:
            evicted = [each for each in islice(self._idle, 1) if each.since + _IDLE_SECONDS < now]
        for connection in evicted:
            if not connection.has_requested and not connection.refused:
                # The response to the request that it may be about to send.
                connection.transport.write(_SERVER_FULL)
            self._unlist(connection)
            connection.transport.abort()
        self.evicted += len(evicted)
        return bool(evicted)
