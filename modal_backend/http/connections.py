"""One connection of the HTTP server, and its deadlines.

uvicorn bounds neither the number of connections nor the time in which a request has to arrive.
Which connection has to make room depends on whether it has presented a valid key, and only the app
knows that; a subclass of uvicorn's protocol can ask it, where an option of another server
(Hypercorn, Granian) could not. httptools rather than h11, because h11 needs a third more processor
time for a query; the one thing that httptools gets wrong, `Upgrade`, is corrected here.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any, Final

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from modal_backend.http.connection_table import ConnectionTable, last_answer

HEADER_BYTES: Final = 65_536
HEADER_SECONDS: Final = 10.0
BODY_SECONDS: Final = 300.0
STALLED_SECONDS: Final = 60.0
"""A caller who reads nothing of an answer for this long is disconnected."""
LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 2**20
"""How long, and how much, a refused caller may go on sending before the connection is closed:
closing it while data arrives would make TCP discard the answer that says why."""


_PARSED_AT_ONCE: Final = 8192


class _Flow(FlowControl):
    """Reads nothing more while requests wait, even if the app of an earlier one asks for more."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        super().__init__(transport)
        self._connection = connection

    def resume_reading(self) -> None:
        if not self._connection.has_backlog:
            super().resume_reading()


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
        self._unparsed = bytearray()
        self._bytes_since_body = 0
        """Received in a body that are none of it: trailers, extensions of chunks."""
        self._lingering: int | None = None
        """Bytes that will still be read and ignored; None before the connection was refused."""

    @property
    def refused(self) -> bool:
        """Whether its last answer was sent: nothing can be written any more."""
        return self._lingering is not None

    @property
    def authorized(self) -> bool:
        """Whether the newest request has presented a valid key."""
        return self.scope is not None and bool(self.scope["state"].get("authorized"))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport, self)
        self._table.add(self)
        self._deadline = self.loop.time() + HEADER_SECONDS

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn forgets it where there was an error
        self._table.remove(self)

    def data_received(self, data: bytes) -> None:
        if self._lingering is not None:
            self._lingering -= len(data)
            if self._lingering < 0:
                self.transport.close()
            return
        self._unparsed += data
        self._parse()

    @property
    def has_backlog(self) -> bool:
        """Whether a request, or data that may be one, waits for the answer to an earlier one."""
        return bool(self.pipeline or self._unparsed)

    def _parse(self) -> None:
        """Parse what was received until a request has to wait. A caller may send thousands of
        requests in one packet."""
        while self._unparsed and not (self.pipeline or self.refused or self.transport.is_closing()):
            data = bytes(self._unparsed[:_PARSED_AT_ONCE])
            del self._unparsed[:_PARSED_AT_ONCE]
            self._parse_part(data)
        if self.has_backlog:
            self.flow.pause_reading()

    def _parse_part(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        request = self.scope
        self._bytes_since_body += len(data)
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
        # Data in which the request began is not counted: most of it may belong to the one before.
        if self._in_header and self.scope is request:
            self._header_bytes += len(data)
        excess = self._in_body and self._bytes_since_body > HEADER_BYTES
        if excess or (self._in_header and self._header_bytes > HEADER_BYTES):
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

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_header:  # a trailer is no header (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._bytes_since_body = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.parser.should_upgrade():
            return
        self.has_requested = True
        self._in_header = False
        self._in_body = True
        self._bytes_since_body = 0
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
        if self._lingering is not None:
            return
        super().on_response_complete()
        self._parse()
        self.flow.resume_reading()
        if self.refused:
            return
        if self.transport.is_closing():
            self._deadline = self.loop.time() + STALLED_SECONDS
            return
        if self._answering:  # the next request, which had arrived before
            return
        if not (self._in_body or self._in_header):
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
        elif self.refused and self._deadline < now:
            self._deadline = now + STALLED_SECONDS
            self.transport.close()
        elif self._deadline < now and not self.flow.read_paused:
            self._table.closed.late += 1
            self._deadline = now + STALLED_SECONDS
            if self._in_body and not self.cycle.response_started:
                self._refuse(408, f"The body did not arrive within {BODY_SECONDS:.0f} s.")
            else:
                self.transport.close()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, reason: str) -> None:
        """Answer what is no complete request, and close the connection."""
        if self.transport.is_closing() or self.refused:
            return
        unanswered = self._in_body and not self.cycle.response_started
        between_requests = not self._answering and not self._in_body
        if unanswered:  # the app must not answer too
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        if (unanswered or between_requests) and not self.pipeline:
            answer = last_answer(status, "content-type: text/plain\r\n", reason.encode())
            self.transport.write(answer)
            if self.transport.can_write_eof():  # TLS cannot
                self.transport.write_eof()
                self._lingering = LINGER_BYTES
                self._unparsed.clear()
                self._deadline = self.loop.time() + LINGER_SECONDS
                self.flow.resume_reading()
                return
        self._deadline = self.loop.time() + STALLED_SECONDS
        self.transport.close()
