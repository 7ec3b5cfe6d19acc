"""The embedded engine in a process of its own, for `kalm serve`.

In the server's process the model would share Python's global lock with the HTTP server: refusing
the excess at five times the capacity slowed the model down by a quarter, and a chunk of long texts
delayed every other answer.

The process has two threads, one of which computes long texts only: a text of 8,192 tokens takes a
second, and no query should wait for it.
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
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, BinaryIO, Final, Self

from kalm_integrations.errors import (
    ContainerFailedError,
    EngineLoadError,
    KalmError,
    ServiceUnavailableError,
    TransportError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.protocol import Truncate
from modal_backend.engines.embedded import QUERIES_AHEAD, ChunkOutput, EmbeddedEngine
from modal_backend.engines.priority_lock import PriorityLock

_CHECK_SECONDS: Final = 0.25
_LENGTH_BYTES: Final = 4
"""Each message is a pickled object after its length. Only the two processes can write to it."""


class ProcessEngine(EmbeddedEngine):
    """`EmbeddedEngine`, computed by a child process. Made by `start`; for one event loop."""

    def __init__(
        self,
        identity: SpaceIdentity,
        process: multiprocessing.process.BaseProcess,
        channels: tuple[_Channel, _Channel],
    ) -> None:
        self._identity = identity
        self._process = process
        self._channels = channels
        """To the thread for short texts, and to the one for long texts."""
        self._locks = (PriorityLock(QUERIES_AHEAD), PriorityLock(QUERIES_AHEAD))
        self._closed = False

    @classmethod
    async def start(cls) -> Self:
        """Start the process and have it load the model. Takes about a second.

        Raises:
            EngineLoadError: See `EmbeddedEngine.load`; or the process died.
        """
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads' locks
        pairs = socket.socketpair(), socket.socketpair()
        process = context.Process(
            target=_run, args=[theirs for _, theirs in pairs], name="kalm-engine", daemon=True
        )
        process.start()
        atexit.register(process.kill)  # before multiprocessing waits for its end
        for _, theirs in pairs:
            theirs.close()
        short, long = [ours for ours, _ in pairs]
        with short.makefile("rb") as stream:
            message = await asyncio.to_thread(_read, stream)
        if message is None:
            process.join()
            status = process.exitcode
            message = None, EngineLoadError(f"the engine's process ended with status {status}.")
        identity, error = message
        if error is not None:
            short.close()
            long.close()
            process.join()
            raise error
        return cls(identity, process, (await _Channel.over(short), await _Channel.over(long)))

    async def _run(
        self, long: bool, texts: Sequence[str], truncate: Truncate, start: int, most: int
    ) -> ChunkOutput:
        """See `EmbeddedEngine._run`.

        Raises:
            ContainerFailedError: The process died.
            ServiceUnavailableError: The engine was closed meanwhile.
        """
        try:
            output, error = await self._channels[long].call((texts, truncate, start, most))
        except EOFError:
            raise self._ending() from None
        if error is not None:
            raise error
        return output  # type: ignore[no-any-return]

    async def died(self) -> KalmError:
        """Wait until the process has died; what callers are to be told then."""
        while self._closed or self._process.is_alive():  # noqa: ASYNC110 (another process)
            await asyncio.sleep(_CHECK_SECONDS)
        return self._ending()

    async def close(self) -> None:
        """End the process, whatever it computes. Calls in progress fail."""
        if self._closed:
            return
        self._closed = True
        self._process.kill()
        await asyncio.to_thread(self._process.join)
        atexit.unregister(self._process.kill)
        for channel in self._channels:
            channel.close()

    def _ending(self) -> KalmError:
        if self._closed:
            return ServiceUnavailableError("the service is stopping.", retry_after=1.0)
        return ContainerFailedError("the engine's process died.")


class _Channel(asyncio.Protocol):
    """Calls to a thread of the process, answered in their order.

    Some calls are sent while one is computed, so that the process need not wait for the server,
    which may be busy. The event loop itself sends and receives: handing over to threads that wait
    for Python's lock would take longer than a query.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._room = asyncio.Semaphore(1 + QUERIES_AHEAD)
        self._ended = False

    @classmethod
    async def over(cls, connection: socket.socket) -> Self:
        """The channel over a connected socket."""
        _, channel = await asyncio.get_running_loop().create_connection(cls, sock=connection)
        return channel

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def call(self, arguments: tuple[Any, ...]) -> Any:
        """The answer to a call. One that is cancelled before there is room is never sent.

        Raises:
            EOFError: The process has ended.
        """
        await self._room.acquire()  # released when the answer arrives, even if its caller has left
        if self._ended:
            self._room.release()
            raise EOFError
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        self._transport.write(_framed(arguments))
        return await answer

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= _LENGTH_BYTES:
            end = _LENGTH_BYTES + int.from_bytes(self._buffer[:_LENGTH_BYTES])
            if len(self._buffer) < end:
                return
            content = bytes(self._buffer[_LENGTH_BYTES:end])
            del self._buffer[:end]
            answer = self._waiting.popleft()
            self._room.release()
            if not answer.done():  # else its caller has left
                answer.set_result(pickle.loads(content))  # noqa: S301 (from our own process)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        while self._waiting:
            self._room.release()
            if not (answer := self._waiting.popleft()).done():
                answer.set_exception(EOFError())


def _run(short: socket.socket, long: socket.socket) -> None:
    """The process: answer until the other ends of the sockets are closed."""
    # Ctrl-C, and a supervisor's SIGTERM, go to all processes of a group. The server ends this one
    # when everything is answered.
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
        while (arguments := _read(stream)) is not None:
            output, failure = None, None
            try:
                output = engine.compute(*arguments)
            except KalmError as error:
                failure = error
            except Exception as error:  # noqa: BLE001 (one that may be impossible to send)
                failure = TransportError(f"the engine failed: {type(error).__name__}: {error}.")
            connection.sendall(_framed((output, failure)))


def _framed(message: object) -> bytes:
    content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return len(content).to_bytes(_LENGTH_BYTES) + content


def _read(stream: BinaryIO) -> Any:
    """The next message; None at the end of the stream."""
    length = stream.read(_LENGTH_BYTES)
    content = stream.read(int.from_bytes(length))
    return pickle.loads(content) if content else None  # noqa: S301 (from our own process)
