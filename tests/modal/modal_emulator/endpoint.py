"""A gRPC server that ends when it is told to."""

import asyncio
import weakref

import grpclib.server
from grpclib.config import Configuration
from grpclib.protocol import H2Protocol
from modal_proto import api_grpc

_WINDOW = 64 * 1024 * 1024


class Endpoint(grpclib.server.Server):
    """`grpclib`, when closed, listens no more but leaves hanging up to its clients. Not this."""

    def __init__(self, service: api_grpc.ModalClientBase) -> None:
        config = Configuration(
            http2_connection_window_size=_WINDOW, http2_stream_window_size=_WINDOW
        )
        super().__init__([service], config=config)
        self._connections: weakref.WeakSet[H2Protocol] = weakref.WeakSet()

    def _protocol_factory(self) -> H2Protocol:
        protocol = super()._protocol_factory()
        self._connections.add(protocol)
        return protocol

    @property
    def port(self) -> int:
        assert isinstance(self._server, asyncio.Server)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def hang_up(self) -> None:
        self.close()
        for protocol in list(self._connections):
            protocol.processor.close()
        # asyncio closes the sockets in the loop's next turns.
        for _ in range(3):
            await asyncio.sleep(0)
