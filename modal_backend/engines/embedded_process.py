"""The embedded engine in a child process, for `kalm serve`.

In the server's process they would share Python's global lock: at five times the capacity, refusing
requests slowed the model down by a quarter, and long texts delayed every other response. The child
has a second thread for long texts: 8,192 tokens take a second, too long for a query to wait.
"""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import pickle
import signal
import socket
import threading
from collections import deque
from contextlib import suppress
from typing import Any, BinaryIO, Final, Self

from kalm_integrations.errors import (
    ContainerFailedError,
    EngineLoadError,
    KalmError,
    TransportError,
)
from kalm_integrations.identity import SpaceIdentity
from modal_backend.engines.base import LIVENESS_SECONDS, stopping_error
from modal_backend.engines.embedded import EXTRA_QUERIES, Chunk, ChunkOutput, EmbeddedEngine
from modal_backend.engines.priority_lock import PriorityLock

_LENGTH_BYTES: Final = 4
"""A message is its length and a pickled object. Only the two processes can write to the socket."""


class ProcessEngine(EmbeddedEngine):
    """`EmbeddedEngine` in a child process, for one event loop. Use `start` to create it."""

    def __init__(
        self,
        identity: SpaceIdentity,
        process: multiprocessing.process.BaseProcess,
        channels: tuple[_Channel, _Channel],
    ) -> None:
        self.identity = identity
        self._process = process
        self._channels = channels
        """To the thread for short texts, and to the one for long texts."""
        self._locks = (PriorityLock(EXTRA_QUERIES), PriorityLock(EXTRA_QUERIES))
        self._closed = False

    @classmethod
    async def start(cls) -> Self:
        """Start the child and load the model in about a second; see `EmbeddedEngine.load`."""
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads' locks
        (short, child_short), (long, child_long) = socket.socketpair(), socket.socketpair()
        process = context.Process(
            target=_serve, args=(child_short, child_long), name="kalm-engine", daemon=True
        )
        process.start()
        atexit.register(process.kill)  # before multiprocessing waits for its end
        child_short.close()
        child_long.close()
        with short.makefile("rb") as stream:
            message = await asyncio.to_thread(_read, stream)
        identity, error = message or (None, None)
        if identity is None:
            short.close()
            long.close()
            process.join()
            status = process.exitcode
            raise error or EngineLoadError(f"the engine's process ended with status {status}.")
        return cls(identity, process, (await _Channel.over(short), await _Channel.over(long)))

    async def _run(self, long: bool, chunk: Chunk) -> ChunkOutput:
        try:
            output, error = await self._channels[long].call(chunk)
        except EOFError:
            raise self._end_error() from None
        if error is not None:
            raise error
        return output  # type: ignore[no-any-return]

    async def died(self) -> KalmError:
        """Wait until the child has died; return the error for later callers."""
        while self._closed or self._process.is_alive():  # noqa: ASYNC110 (another process)
            await asyncio.sleep(LIVENESS_SECONDS)
        return self._end_error()

    async def close(self) -> None:
        """End the child, whatever it computes. Calls in progress fail."""
        if self._closed:
            return
        self._closed = True
        self._process.kill()
        await asyncio.to_thread(self._process.join)
        atexit.unregister(self._process.kill)
        for channel in self._channels:
            channel.close()

    def _end_error(self) -> KalmError:
        if self._closed:
            return stopping_error()
        return ContainerFailedError("the engine's process died.")


class _Channel(asyncio.Protocol):
    """Calls to a thread of the child, answered in order. Several are sent ahead, so that the child
    need not wait for a busy server. The event loop itself sends and receives: a hand-over between
    threads would take longer than a query."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._slots = asyncio.Semaphore(1 + EXTRA_QUERIES)
        self._ended = False

    @classmethod
    async def over(cls, connection: socket.socket) -> Self:
        """Return the channel over a connected socket."""
        _, channel = await asyncio.get_running_loop().create_connection(cls, sock=connection)
        return channel

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def call(self, chunk: Chunk) -> Any:
        """Return the response, or raise `EOFError` if the child has ended. A call that is cancelled
        before it has a slot is never sent."""
        await self._slots.acquire()  # released by the response, even if the caller has left
        if self._ended:
            self._slots.release()
            raise EOFError
        response = asyncio.get_running_loop().create_future()
        self._waiting.append(response)
        self._transport.write(_framed(chunk))
        return await response

    def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= _LENGTH_BYTES:
            end = _LENGTH_BYTES + int.from_bytes(self._buffer[:_LENGTH_BYTES])
            if len(self._buffer) < end:
                return
            content = bytes(self._buffer[_LENGTH_BYTES:end])
            del self._buffer[:end]
            response = self._waiting.popleft()
            self._slots.release()
            if not response.done():  # else the caller has left
                response.set_result(pickle.loads(content))  # noqa: S301 (from our own process)  # nosec B301

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        while self._waiting:
            self._slots.release()
            if not (response := self._waiting.popleft()).done():
                response.set_exception(EOFError())


def _serve(short: socket.socket, long: socket.socket) -> None:
    """The child's main function: answer until the parent closes the sockets."""
    # Ctrl-C and a supervisor's SIGTERM reach the whole process group. The parent ends this process
    # once all calls are answered.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        engine = EmbeddedEngine.load()
    except KalmError as error:
        short.sendall(_framed((None, error)))
        return
    with suppress(ImportError):  # two threads cannot set and reset it at the same time
        from threadpoolctl import threadpool_limits

        threadpool_limits(1, user_api="blas")
    threading.Thread(target=_answer, args=(engine, long), daemon=True).start()
    short.sendall(_framed((engine.identity, None)))
    _answer(engine, short)


def _answer(engine: EmbeddedEngine, connection: socket.socket) -> None:
    with suppress(OSError), connection.makefile("rb") as stream:
        while (chunk := _read(stream)) is not None:
            output, failure = None, None
            try:
                output = engine.compute(chunk)
            except KalmError as error:
                failure = error
            except Exception as error:  # noqa: BLE001 (it may not be picklable)
                failure = TransportError(f"the engine failed: {type(error).__name__}: {error}.")
            connection.sendall(_framed((output, failure)))


def _framed(message: object) -> bytes:
    content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return len(content).to_bytes(_LENGTH_BYTES) + content


def _read(stream: BinaryIO) -> Any:
    """Read the next message; None at the end of the stream."""
    length = stream.read(_LENGTH_BYTES)
    content = stream.read(int.from_bytes(length))
    return pickle.loads(content) if content else None  # noqa: S301 (from our own process)  # nosec B301
