"""A proxy on loopback that delays every byte and the end of each connection."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from urllib.parse import urlsplit

from loopback_server import LoopbackServer


class DelayingProxy(LoopbackServer):
    """Forwards connections.

    Args:
        url: Of the server.
        seconds: Of delay, each way.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self._server = urlsplit(url)
        self._seconds = seconds

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.CancelledError):
            server = await asyncio.open_connection(self._server.hostname, self._server.port)
            await asyncio.gather(self._forward(reader, server[1]), self._forward(server[0], writer))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                await asyncio.sleep(self._seconds)
                writer.write(data)
            await asyncio.sleep(self._seconds)
        finally:
            writer.close()
