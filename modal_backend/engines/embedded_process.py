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
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Final, Self

from kalm_integrations.errors import (
    ContainerFailedError,
    EngineLoadError,
    InvalidText,
    KalmError,
    ServiceUnavailableError,
    TransportError,
)
from kalm_integrations.wire import Truncate
from modal_backend.engines.embedded import EmbeddedEngine, Thread

_CHECK_SECONDS: Final = 0.25


class ProcessEngine(EmbeddedEngine):
    """`EmbeddedEngine`, computed by a child process. Made by `load`."""

    _process: multiprocessing.process.BaseProcess
    _pipes: tuple[_Pipe, _Pipe]
    """To the process's thread for short texts, and to the one for long texts."""
    _closed = False

    @classmethod
    def load(cls) -> Self:
        """Start the process and have it load the model. Takes about a second.

        Raises:
            EngineLoadError: See `EmbeddedEngine.load`; or the process died.
        """
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads' locks
        (short, its_short), (long, its_long) = context.Pipe(), context.Pipe()
        process = context.Process(
            target=_run, args=(its_short, its_long), name="kalm-engine", daemon=True
        )
        process.start()
        atexit.register(process.kill)  # before multiprocessing waits for its end
        its_short.close()
        its_long.close()
        try:
            identity, error = short.recv()
        except EOFError:
            process.join()
            error = EngineLoadError(f"the engine's process ended with status {process.exitcode}.")
        if error is not None:
            short.close()
            long.close()
            process.join()
            raise error
        engine = cls(None, None, identity)
        engine._short.worker.stop()
        engine._short = Thread("kalm-engine", threads=4)
        engine._long = Thread("kalm-engine-long")
        engine._process, engine._pipes = process, (_Pipe(short), _Pipe(long))
        return engine

    def compute(
        self, long: bool, texts: Sequence[str], truncate: Truncate, start: int, most: int
    ) -> tuple[list[list[int]], Any, list[InvalidText]]:
        """See `EmbeddedEngine.compute`.

        Raises:
            ContainerFailedError: The process died.
            ServiceUnavailableError: The engine was closed meanwhile.
        """
        try:
            result, error = self._pipes[long].call((long, texts, truncate, start, most))
        except (EOFError, OSError):
            raise self._ending() from None
        if error is not None:
            raise error
        answer: tuple[list[list[int]], Any, list[InvalidText]] = result
        return answer

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
        await super().close()
        for pipe in self._pipes:
            pipe.close()

    def _ending(self) -> KalmError:
        if self._closed:
            return ServiceUnavailableError("the service is stopping.", retry_after=1.0)
        return ContainerFailedError("the engine's process died.")


class _Pipe:
    """Calls to the process over one connection. The next call is sent while one is computed, so
    that the process need not wait for the server, which may be busy."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._last = threading.Event()
        """Whether the answer to the newest call has been received."""
        self._last.set()

    def call(self, arguments: tuple[Any, ...]) -> tuple[Any, Exception | None]:
        """The answer; answers come in the order of calls. Blocks."""
        received = threading.Event()
        with self._sending:
            self._connection.send(arguments)
            previous, self._last = self._last, received
        previous.wait()
        try:
            answer: tuple[Any, Exception | None] = self._connection.recv()
            return answer
        finally:
            received.set()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _run(short: Connection, long: Connection) -> None:
    """The process: answer until the other ends of the connections are closed."""
    # Ctrl-C, and a supervisor's SIGTERM, go to all processes of a group. The server ends this one
    # when everything is answered.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        engine = EmbeddedEngine.load()
    except KalmError as error:
        short.send((None, error))
        return
    with suppress(ImportError):  # two threads cannot set and reset it at the same time
        from threadpoolctl import threadpool_limits

        threadpool_limits(1, user_api="blas")
    threading.Thread(target=_answer, args=(engine, long), daemon=True).start()
    short.send((engine.identity, None))
    _answer(engine, short)


def _answer(engine: EmbeddedEngine, connection: Connection) -> None:
    try:
        while True:
            arguments = connection.recv()
            try:
                answer = engine.compute(*arguments), None
            except KalmError as error:
                answer = None, error  # type: ignore[assignment]
            except Exception as error:  # noqa: BLE001 (one that may be impossible to send)
                failure = TransportError(f"the engine failed: {type(error).__name__}: {error}.")
                answer = None, failure  # type: ignore[assignment]
            connection.send(answer)
    except (EOFError, OSError):  # the server is gone
        return
