"""The background event loop: one daemon thread per process, which owns all connections.

Every call runs its coroutines there: sync callers, threads, worker processes, Jupyter and async
callers of any loop. So connections survive the caller's loop. The thread starts with the first
call, never on import or construction. This module also handles fork and exit, for all transports.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.native_threads import NativeFuture, NativeThread, new_queue, original

T = TypeVar("T")

_STOP_TIMEOUT = 5.0  # seconds that the interpreter's exit waits for calls to end
_FORK_TIMEOUT = 5.0  # seconds that a fork and the thread wait for each other


class Closable(Protocol):
    """Something that is open on the loop."""

    async def close(self) -> None:
        """Close it; do nothing if it is closed."""
        ...


class _EventLoop(asyncio.SelectorEventLoop):
    """An event loop without gevent's sockets, which can be detached after a fork.

    Its executor is a daemon thread per call. asyncio's own delays the interpreter's exit, for
    instance until a name server responds, and is refused once the main thread has ended, although
    other threads may still embed.
    """

    _internal_fds: int

    def __init__(self) -> None:
        self._registered = original("selectors", "DefaultSelector")()
        super().__init__(self._registered)
        self.slow_callback_duration = math.inf  # under -X dev: a first import takes a while

    def detach_after_fork(self) -> None:
        """In a forked child: release the parent's connections, which would stay open otherwise.

        Closing the sockets might change the selector, which the parent shares; so their file
        descriptors are redirected to the null device.
        """
        null = os.open(os.devnull, os.O_RDWR)
        for key in (self._registered.get_map() or {}).values():  # None once the loop is closed
            os.dup2(null, key.fd, inheritable=False)
        os.close(null)

    def _make_self_pipe(self) -> None:  # asyncio's own, but for the sockets
        self._ssock, self._csock = original("_socket", "socketpair")()
        self._ssock.setblocking(False)
        self._csock.setblocking(False)
        self._internal_fds += 1
        self._add_reader(self._ssock.fileno(), self._read_from_self)  # type: ignore[attr-defined]

    async def getaddrinfo(self, *args: Any, **kwargs: Any) -> list[Any]:
        lookup = partial(original("socket", "getaddrinfo"), *args, **kwargs)
        return await self._in_thread("kalm-dns", lookup)

    def run_in_executor(  # type: ignore[override]  # with any types
        self, executor: Any, func: Any, *args: Any
    ) -> Any:
        if executor is not None:
            return super().run_in_executor(executor, func, *args)
        return self._in_thread("kalm-worker", partial(func, *args))

    def _in_thread(self, name: str, function: Callable[[], T]) -> asyncio.Future[T]:
        result: Future[T] = NativeFuture()
        result.set_running_or_notify_cancel()

        def run() -> None:
            try:
                result.set_result(function())
            except Exception as error:  # noqa: BLE001 (raised where it is awaited)
                result.set_exception(error)

        NativeThread(run, name)
        return asyncio.wrap_future(result, loop=self)


class BackgroundLoop:
    """A daemon thread that runs an event loop until the process ends."""

    def __init__(self) -> None:
        self.loop = _EventLoop()
        self.resources: set[Closable] = set()
        """Closed when the loop ends."""
        self.process = os.getpid()

    def start(self) -> None:
        """Start the thread."""
        self._thread = NativeThread(self._run, "kalm-io")

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `coroutine` on the thread, with the caller's context variables.

        Cancelling the future cancels the coroutine. A daemon thread that calls while the
        interpreter exits gets a future that never completes, and ends with the process.

        Raises:
            RuntimeError: The caller is the thread itself, which would wait for itself, or the
                interpreter is exiting.
        """
        if self._thread.is_current():
            coroutine.close()
            raise RuntimeError("a blocking call on kalm's own background thread would never return")
        future: Future[T] = NativeFuture()
        if _exiting and threading.current_thread() is not threading.main_thread():
            coroutine.close()
            return future

        def start() -> None:
            if future.cancelled():
                coroutine.close()
                return
            task = self.loop.create_task(_run_into(future, coroutine))

            def cancel(done: Future[T]) -> None:
                if done.cancelled():
                    self._call(task.cancel)

            future.add_done_callback(cancel)

        try:
            self.loop.call_soon_threadsafe(start)
        except RuntimeError:
            coroutine.close()
            raise RuntimeError("the interpreter is exiting: nothing can be embedded now") from None
        return future

    def close_soon(self, resource: Closable) -> None:
        """Close `resource`, if the loop still runs in this process. Takes no lock: finalizers call
        it, at any time and on any thread."""
        if self is _current:

            async def close() -> None:
                self.resources.discard(resource)
                await resource.close()

            self._call(lambda: self.loop.create_task(close()))

    def stop(self) -> None:
        """Cancel all tasks, close all resources, end the loop, join the thread."""
        self._call(self.loop.stop)
        self._thread.join(_STOP_TIMEOUT)

    def pause_until(self, resume: SimpleQueue[None]) -> None:
        """Pause the thread between two callbacks, where it imports nothing and holds no lock."""
        paused = new_queue()

        def pause() -> None:
            paused.put(None)
            with contextlib.suppress(Empty):
                resume.get(timeout=_FORK_TIMEOUT)

        if not self._thread.is_current():
            with contextlib.suppress(RuntimeError, Empty):  # the loop has ended, or is busy
                self.loop.call_soon_threadsafe(pause)
                paused.get(timeout=_FORK_TIMEOUT)

    def _call(self, callback: Callable[[], object]) -> None:
        """Call `callback` on the thread, unless the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(callback)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.run_until_complete(self._shutdown())
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()

    async def _shutdown(self) -> None:
        closing = [asyncio.ensure_future(resource.close()) for resource in self.resources]
        while tasks := asyncio.all_tasks() - {asyncio.current_task(), *closing}:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # more may have started
        await asyncio.gather(*closing, return_exceptions=True)


async def _run_into(future: Future[T], coroutine: Coroutine[Any, Any, T]) -> None:
    """Set the result at once; `run_coroutine_threadsafe` takes two more iterations of the loop."""
    try:
        result = await coroutine
    except asyncio.CancelledError:
        if not _exiting:  # then daemon threads wait; resumed, one would only print a traceback
            future.cancel()
        raise
    except BaseException as error:
        with contextlib.suppress(InvalidStateError):  # cancelled in the meantime
            future.set_exception(error)
        if not isinstance(error, Exception):
            raise
    else:
        with contextlib.suppress(InvalidStateError):
            future.set_result(result)
    finally:
        del future  # otherwise the exception, its traceback and this frame form a cycle


_lock = original("_thread", "allocate_lock")()
_current: BackgroundLoop | None = None
_abandoned: list[BackgroundLoop] = []
_exiting = False


def background_loop() -> BackgroundLoop:
    """This process's background loop, started if necessary.

    Raises:
        ConfigurationError: eventlet has patched the standard library.
    """
    global _current
    if (eventlet := sys.modules.get("eventlet.patcher")) and eventlet.already_patched:
        raise ConfigurationError(
            "eventlet.monkey_patch() has replaced the threads and sockets that this client needs, "
            "and calls would hang: use threads or gevent instead of eventlet."
        )
    if _current is not None and _current.process != os.getpid():
        _after_fork_in_child()  # of a fork that Python was not told of
    if (found := _current) is not None:
        return found
    new = BackgroundLoop()  # before the lock, which must not be held while a greenlet waits
    with _lock:
        found = _current  # another thread's
        if found is None:
            new.start()
            _current = found = new
    if found is not new:
        new.loop.close()
    return found


def is_exiting() -> bool:
    """Whether the interpreter is exiting. All connections are closed then."""
    return _exiting


_fork = threading.local()
"""`done`: receives an item after the fork that this thread begins."""


def _before_fork() -> None:
    # A half-finished import or a held lock would stay so in the child.
    _fork.done = new_queue()
    if _current is not None:
        _current.pause_until(_fork.done)


def _after_fork_in_parent() -> None:
    _fork.done.put(None)


def _after_fork_in_child() -> None:
    # A forked child has the parent's objects but not its threads. Nothing may change the parent's
    # loop, not even the garbage collector: parent and child share its selector.
    global _lock, _current, _exiting
    if _current is not None:
        _current.loop.detach_after_fork()
        _abandoned.append(_current)
    _lock = original("_thread", "allocate_lock")()
    _current, _exiting = None, False


@atexit.register
def _stop_at_exit() -> None:
    global _exiting
    _exiting = True
    if _current is not None and _current.process == os.getpid():
        _current.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
