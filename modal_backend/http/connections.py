"""One connection of the HTTP server, and its deadlines.

uvicorn limits neither the number of connections nor the time in which a request has to arrive.
Which connection is closed when there are too many depends on whether it has presented a valid key,
which only the app knows: a subclass of uvicorn's protocol can ask it, an option of another server
could not. It is httptools because h11 needs a third more CPU time for a query.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from modal_backend.http.buffered_transport import BufferedTransport
from modal_backend.http.connection_table import ConnectionTable, final_response

if TYPE_CHECKING:
    from uvicorn._types import HTTPScope

HEADER_BYTES: Final = 65_536
HEADER_SECONDS: Final = 10.0
BODY_SECONDS: Final = 300.0
STALLED_SECONDS: Final = 60.0
"""A caller that reads nothing of a response for this long is disconnected."""
LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 2**20
"""How long, and how much, a refused caller may continue to send before the connection is closed:
if it were closed while data arrives, TCP would discard the response that tells why."""
_PARSED_AT_ONCE: Final = 8192


class _Flow(FlowControl):
    """Pauses reading while requests wait, even if the app of an earlier one resumes it."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        super().__init__(transport)
        self._connection = connection

    def resume_reading(self) -> None:
        if not self._connection.has_backlog:
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with deadlines and a limit for the header. `Upgrade` is ignored, as HTTP
    allows; uvicorn would lose the body of such a request (Java's client offers h2c so). All times
    are seconds of the event loop's clock."""

    def __init__(self, *args: Any, table: ConnectionTable, **options: Any) -> None:
        super().__init__(*args, **options)
        self._table = table
        self.since = 0.0
        """When it was opened, sent its newest header or got its newest response."""
        self._request: HTTPScope | None = None
        """The newest request whose header is complete."""
        self._reading: Literal["header", "body"] | None = None
        self._deadline = math.inf
        self._write_deadline = math.inf
        self._unparsed = bytearray()
        self._overhead = 0
        """Bytes since the header or body began that are not part of a body: headers, trailers,
        extensions of chunks."""
        self._lingering: int | None = None
        """Bytes that will still be read and ignored; None before the connection was refused."""

    @property
    def refused(self) -> bool:
        """Whether its final response was sent."""
        return self._lingering is not None

    @property
    def has_requested(self) -> bool:
        """Whether it has sent a complete header."""
        return self._request is not None

    @property
    def authorized(self) -> bool:
        """Whether the newest request has presented a valid key."""
        return self._request is not None and bool(self._request["state"].get("authorized"))

    @property
    def idle(self) -> bool:
        """Whether no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def has_backlog(self) -> bool:
        """Whether a request, or data that may be one, waits for the response to an earlier one."""
        return bool(self.pipeline or self._unparsed)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast("asyncio.Transport", BufferedTransport(transport)))
        self.flow = _Flow(transport, self)
        self._update_table()
        self._deadline = self.since + HEADER_SECONDS

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn does not, after an error
        self._table.remove(self)

    def data_received(self, data: bytes) -> None:
        if self._lingering is not None:
            self._lingering -= len(data)
            if self._lingering < 0:
                self.transport.close()
            return
        self._unparsed += data
        self._parse()

    def _parse(self) -> None:
        """Parse the received data until a request has to wait. One packet may hold thousands of
        requests."""
        while self._unparsed and not (self.pipeline or self.refused or self.transport.is_closing()):
            data = bytes(self._unparsed[:_PARSED_AT_ONCE])
            del self._unparsed[:_PARSED_AT_ONCE]
            self._parse_part(data)
        if self.has_backlog:
            self.flow.pause_reading()

    def _parse_part(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._overhead += len(data)
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                rest = data[upgrade.args[0] :]
                if self.parser.get_method() == b"CONNECT" or not self.idle:
                    raise httptools.HttpParserError from None
                self.parser = httptools.HttpRequestParser(self)
                self.parser.feed_data(self._header_without_upgrade() + rest)
        # Not logged: anyone can send any number of them.
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._refuse(400, "This is not a valid HTTP request.")
        if self._reading and self._overhead > HEADER_BYTES:
            self._refuse(431, f"The header has over {HEADER_BYTES} bytes.")

    def _should_upgrade(self) -> bool:
        """Keeps uvicorn from starting a request whose header `_parse_part` parses again."""
        return True

    def _header_without_upgrade(self) -> bytes:
        fields = [field for field in self.scope["headers"] if field[0] != b"upgrade"]
        version = self.scope["http_version"].encode()
        lines = [b"%s %s HTTP/%s" % (self.scope["method"].encode(), self.url, version)]
        lines += [b"%s: %s" % field for field in fields]
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reading = "header"
        self._overhead = 0
        self._deadline = self.loop.time() + HEADER_SECONDS

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reading == "header":  # a trailer is not a header (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.parser.should_upgrade():
            return
        self._request = self.scope
        self._reading = "body"
        self._overhead = 0
        self._update_table()
        self._deadline = self.since + BODY_SECONDS
        if self._table.draining or self._table.stopping:
            self.close_after_response()

    def on_body(self, body: bytes) -> None:
        self._overhead = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self.parser.should_upgrade():
            return
        self._reading = None
        self._deadline = math.inf
        if self.idle:
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
        elif self.idle:  # there is no further request yet
            self._update_table()
            if not self._reading:
                self._wait_for_next()
            elif not self.authorized:
                self._deadline = min(self._deadline, self.since + HEADER_SECONDS)

    def _update_table(self) -> None:
        self.since = self.loop.time()
        self._table.update(self)

    def _wait_for_next(self) -> None:
        self._deadline = self.loop.time() + self.timeout_keep_alive + 1

    def close_after_response(self) -> None:
        """End the connection with the response, if that has not begun."""
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
        """End the connection if a deadline has passed."""
        late = self._deadline < now
        if self._write_deadline < now or (late and self.transport.is_closing()):
            self._table.timed_out += 1
            self.transport.abort()
        elif late and (self.refused or not self.flow.read_paused):
            self._table.timed_out += not self.refused
            if self._can_refuse_body():
                self._refuse(408, f"The body did not arrive within {BODY_SECONDS:.0f} s.")
            else:
                self._close()

    def _can_refuse_body(self) -> bool:
        """Whether a body is being received, and the response to it has not begun."""
        return self._reading == "body" and not (self.refused or self.cycle.response_started)

    def _refuse(self, status: int, reason: str) -> None:
        """Answer an incomplete request, and close the connection."""
        if self.transport.is_closing() or self.refused:
            return
        in_body = self._can_refuse_body()
        if in_body:  # the app must not respond too
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        between_requests = self.idle and self._reading != "body"
        if (in_body or between_requests) and not self.pipeline:
            body = reason.encode()
            self.transport.write(final_response(status, "content-type: text/plain\r\n", body))
            if self.transport.can_write_eof():  # not with TLS
                self.transport.write_eof()
                self._lingering = LINGER_BYTES
                self._unparsed.clear()
                self._deadline = self.loop.time() + LINGER_SECONDS
                self.flow.resume_reading()
                return
        self._close()

    def _close(self) -> None:
        """Close the connection once everything is written."""
        self._deadline = self.loop.time() + STALLED_SECONDS
        self.transport.close()
