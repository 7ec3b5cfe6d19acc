"""The transport of a connection, which sends what is written together in one packet."""

from __future__ import annotations

import asyncio
from typing import Any, Final

_BUFFERED_AT_ONCE: Final = 65_536


class BufferedTransport:
    """A transport that sends in one packet what is written in one step of the event loop.

    uvicorn writes the header and the body of a response one after the other. The second system call
    would take longer than everything else that refusing a request does, and wake the caller twice.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._parts:
            asyncio.get_running_loop().call_soon(self._flush)
        self._parts.append(data)
        if len(data) > _BUFFERED_AT_ONCE:
            self._flush()

    def write_eof(self) -> None:
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._flush()
        self._transport.abort()

    def _flush(self) -> None:
        if self._parts:
            self._transport.write(b"".join(self._parts))
            self._parts.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
