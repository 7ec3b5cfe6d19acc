"""The one background thread of a process that owns the event loop and all connections.

Sync callers, async callers of any loop, Jupyter, threads and worker processes all hand their
coroutines to it, so that none of them needs a loop of its own, and a second `asyncio.run` finds
the connections alive. It starts with the first call, never on import or construction.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import math
import os
import selectors
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, InvalidStateError
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

_STOP_TIMEOUT = 5.0  # seconds that the interpreter's exit waits for calls to unwind
_STAND_TIMEOUT = 5.0  # seconds that a fork and the thread wait for each other


class Closable(Protocol):
    """Something that is open on the loop."""

    async def close(self) -> None:
        """Close it; once it is closed, do nothing."""
        ...


class ClientLoop(asyncio.SelectorEventLoop):
    """An event loop that looks names up on daemon threads, and can be left behind by a fork.

    asyncio's own lookups are waited for when the interpreter exits, however long the name server
    takes, and are refused once the main thread has ended, though others may go on embedding.
    """

    def __init__(self) -> None:
        self._watched = selectors.DefaultSelector()
        super().__init__(self._watched)
        self.slow_callback_duration = math.inf  # under -X dev; a first import takes a while

    def let_go(self) -> None:
        """In a forked child: give up the parent's connections.

        They would stay open for the child's life, whatever the parent does with its own. Closed
        as sockets they might be told to the selector, which is shared with the parent; so their
        numbers are left to them, with nothing behind.
        """
        nothing = os.open(os.devnull, os.O_RDWR)
        for key in (self._watched.get_map() or {}).values():  # None once the loop has ended
            os.dup2(nothing, key.fd, inheritable=False)
        os.close(nothing)

    async def getaddrinfo(self, *args: Any, **hints: Any) -> list[Any]:
        found: Future[list[Any]] = Future()
        found.set_running_or_notify_cancel()

        def look_up() -> None:
            try:
                found.set_result(socket.getaddrinfo(*args, **hints))
            except Exception as error:  # noqa: BLE001 (raised where it is awaited)
                found.set_exception(error)

        threading.Thread(target=look_up, name="kalm-dns", daemon=True).start()
        return await asyncio.wrap_future(found)


class IOThread:
    """A daemon thread that runs an event loop until the process ends."""

    def __init__(self) -> None:
        self.loop = ClientLoop()
        self.resources: set[Closable] = set()
        """What is open on the loop, to be closed when it ends."""
        self._thread = threading.Thread(target=self._run, name="kalm-io", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `coroutine` on the thread, with the caller's context variables.

        Cancelling the future cancels the coroutine. When the interpreter is ending, daemon
        threads may still call; they get a future that is never done, and end with it.

        Raises:
            RuntimeError: The caller is the thread itself, which would wait for itself, or the
                interpreter is ending.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("a blocking call on kalm's own I/O thread would never return")
        future: Future[T] = Future()
        if _ending and threading.current_thread() is not threading.main_thread():
            coroutine.close()
            return future

        def start() -> None:
            if future.cancelled():
                coroutine.close()
                return
            task = self.loop.create_task(_deliver(coroutine, future))
            future.add_done_callback(lambda done: self._cancel(task, done))

        try:
            self.loop.call_soon_threadsafe(start)
        except RuntimeError:
            coroutine.close()
            raise RuntimeError("the interpreter is ending: nothing can be embedded now") from None
        return future

    def _cancel(self, task: asyncio.Task[None], future: Future[Any]) -> None:
        """End a task whose future its caller has cancelled, from whatever thread."""
        if future.cancelled():
            with contextlib.suppress(RuntimeError):  # the loop has ended, and all tasks with it
                self.loop.call_soon_threadsafe(task.cancel)

    def discard(self, resource: Closable) -> None:
        """Close `resource` some time soon. May be called from anywhere, a finalizer included."""

        async def close() -> None:
            self.resources.discard(resource)
            await resource.close()

        with contextlib.suppress(RuntimeError):  # the loop has ended, and closed it
            asyncio.run_coroutine_threadsafe(closing := close(), self.loop)
            return
        closing.close()

    def stop(self) -> None:
        """Cancel what runs, close what is open, end the loop, join the thread."""
        if not self.loop.is_closed():
            with contextlib.suppress(RuntimeError):  # the loop closed in between
                self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_STOP_TIMEOUT)

    def stand_still(self, go_on: threading.Event) -> None:
        """Have the thread wait for `go_on` between two callbacks, where it imports nothing and
        holds no lock."""
        standing = threading.Event()

        def stand() -> None:
            standing.set()
            go_on.wait(_STAND_TIMEOUT)

        if threading.current_thread() is not self._thread:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(stand)
                standing.wait(_STAND_TIMEOUT)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.run_until_complete(self._wind_up())
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()

    async def _wind_up(self) -> None:
        closing = [asyncio.ensure_future(resource.close()) for resource in self.resources]
        while tasks := asyncio.all_tasks() - {asyncio.current_task(), *closing}:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # and more may have come
        await asyncio.gather(*closing, return_exceptions=True)


async def _deliver(coroutine: Coroutine[Any, Any, T], future: Future[T]) -> None:
    """Wake the caller as soon as there is something; asyncio's own way takes two rounds more."""
    try:
        result = await coroutine
    except asyncio.CancelledError:
        if not _ending:  # else a daemon thread waits: woken, it would only print a traceback
            future.cancel()
        raise
    except BaseException as error:
        with contextlib.suppress(InvalidStateError):  # cancelled by now
            future.set_exception(error)
        if not isinstance(error, Exception):
            raise
    else:
        with contextlib.suppress(InvalidStateError):
            future.set_result(result)
    finally:
        del future  # or an exception would hold its traceback, and that this frame, for ever


_lock = threading.Lock()
_current: IOThread | None = None
_abandoned: list[IOThread] = []
_ending = False


def io_thread() -> IOThread:
    """This process's I/O thread, started if need be."""
    global _current
    with _lock:
        if _current is None:
            _current = IOThread()
        return _current


class _Fork(threading.local):
    """The fork that this thread is making."""

    over = threading.Event()


_fork = _Fork()


def _before_fork() -> None:
    # What is half imported at the fork, or locked, would stay so in the child.
    _fork.over = threading.Event()
    if _current is not None:
        _current.stand_still(_fork.over)


def _after_fork_in_parent() -> None:
    _fork.over.set()


def _after_fork_in_child() -> None:
    # A forked child has the parent's objects but not its threads. The parent's loop must stay
    # untouched, even by the garbage collector: its selector is shared with the parent.
    global _lock, _current, _ending
    if _current is not None:
        _current.loop.let_go()
        _abandoned.append(_current)
    _lock = threading.Lock()
    _current, _ending = None, False


def is_running(thread: IOThread) -> bool:
    """Whether `thread` is this process's. Takes no lock: finalizers ask, at any moment."""
    return thread is _current


def is_ending() -> bool:
    """Whether the process is ending, and with it all calls: only daemon threads still wait."""
    return _ending


@atexit.register
def _stop_at_exit() -> None:
    global _ending
    _ending = True
    if _current is not None:
        _current.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
