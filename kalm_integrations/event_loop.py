"""The background thread of a process that owns the event loop and all connections.

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

_STOP_TIMEOUT = 5.0  # seconds that the interpreter's exit waits for calls to end
_FORK_TIMEOUT = 5.0  # seconds that a fork and the thread wait for each other


class Closable(Protocol):
    """Something that is open on the loop."""

    async def close(self) -> None:
        """Close it; once it is closed, do nothing."""
        ...


class _EventLoop(asyncio.SelectorEventLoop):
    """An event loop that resolves host names on daemon threads, and that a fork can abandon.

    asyncio's own lookups delay the interpreter's exit for as long as the name server takes, and
    are refused once the main thread has ended, although other threads may go on embedding.
    """

    def __init__(self) -> None:
        self._watched = selectors.DefaultSelector()
        super().__init__(self._watched)
        self.slow_callback_duration = math.inf  # under -X dev: a first import takes a while

    def detach_after_fork(self) -> None:
        """In a forked child: give up the parent's connections.

        They would stay open for the child's life, whatever the parent does with its own. Closing
        them as sockets might change the selector, which is shared with the parent; so their file
        descriptors are kept and point to nothing.
        """
        nothing = os.open(os.devnull, os.O_RDWR)
        for key in (self._watched.get_map() or {}).values():  # None once the loop is closed
            os.dup2(nothing, key.fd, inheritable=False)
        os.close(nothing)

    async def getaddrinfo(self, *args: Any, **kwargs: Any) -> list[Any]:
        result: Future[list[Any]] = Future()
        result.set_running_or_notify_cancel()

        def resolve() -> None:
            try:
                result.set_result(socket.getaddrinfo(*args, **kwargs))
            except Exception as error:  # noqa: BLE001 (raised where it is awaited)
                result.set_exception(error)

        threading.Thread(target=resolve, name="kalm-dns", daemon=True).start()
        return await asyncio.wrap_future(result)


class BackgroundLoop:
    """A daemon thread that runs an event loop until the process ends."""

    def __init__(self) -> None:
        self.loop = _EventLoop()
        self.resources: set[Closable] = set()
        """What is open on the loop, to be closed when it ends."""
        self._thread = threading.Thread(target=self._run, name="kalm-io", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `coroutine` on the thread, with the caller's context variables.

        Cancelling the future cancels the coroutine. While the interpreter exits, daemon threads
        may still call; they get a future that never completes, and end with the process.

        Raises:
            RuntimeError: The caller is the thread itself, which would wait for itself, or the
                interpreter is exiting.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("a blocking call on kalm's own background thread would never return")
        future: Future[T] = Future()
        if _exiting and threading.current_thread() is not threading.main_thread():
            coroutine.close()
            return future

        def start() -> None:
            if future.cancelled():
                coroutine.close()
                return
            task = self.loop.create_task(_run_into(future, coroutine))
            future.add_done_callback(lambda done: self._cancel(task, done))

        try:
            self.loop.call_soon_threadsafe(start)
        except RuntimeError:
            coroutine.close()
            raise RuntimeError("the interpreter is exiting: nothing can be embedded now") from None
        return future

    def _cancel(self, task: asyncio.Task[None], future: Future[Any]) -> None:
        """Cancel a task whose future was cancelled, from any thread."""
        if future.cancelled():
            with contextlib.suppress(RuntimeError):  # the loop has ended, and all tasks with it
                self.loop.call_soon_threadsafe(task.cancel)

    def discard(self, resource: Closable) -> None:
        """Close `resource` soon. May be called from anywhere, including finalizers."""

        async def close() -> None:
            self.resources.discard(resource)
            await resource.close()

        closing = close()
        try:
            asyncio.run_coroutine_threadsafe(closing, self.loop)
        except RuntimeError:  # the loop has ended, and closed it
            closing.close()

    def stop(self) -> None:
        """Cancel what runs, close what is open, end the loop, join the thread."""
        if not self.loop.is_closed():
            with contextlib.suppress(RuntimeError):  # the loop closed in between
                self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_STOP_TIMEOUT)

    def pause_until(self, resume: threading.Event) -> None:
        """Stop the thread between two callbacks, where it imports nothing and holds no lock."""
        paused = threading.Event()

        def pause() -> None:
            paused.set()
            resume.wait(_FORK_TIMEOUT)

        if threading.current_thread() is not self._thread:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(pause)
                paused.wait(_FORK_TIMEOUT)

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
    """Set the result at once; `run_coroutine_threadsafe` takes two more rounds of the loop."""
    try:
        result = await coroutine
    except asyncio.CancelledError:
        if not _exiting:  # else a daemon thread waits: woken, it would only print a traceback
            future.cancel()
        raise
    except BaseException as error:
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            future.set_exception(error)
        if not isinstance(error, Exception):
            raise
    else:
        with contextlib.suppress(InvalidStateError):
            future.set_result(result)
    finally:
        del future  # or an exception would hold its traceback, and that this frame, for ever


_lock = threading.Lock()
_current: BackgroundLoop | None = None
_abandoned: list[BackgroundLoop] = []
_exiting = False


def background_loop() -> BackgroundLoop:
    """This process's background loop, started if necessary."""
    global _current
    with _lock:
        if _current is None:
            _current = BackgroundLoop()
        return _current


def is_current(loop: BackgroundLoop) -> bool:
    """Whether `loop` is this process's. Takes no lock, because finalizers call it at any time."""
    return loop is _current


def is_exiting() -> bool:
    """Whether the interpreter is exiting, and all calls end with it."""
    return _exiting


class _Fork(threading.local):
    """The fork that this thread is making."""

    done = threading.Event()


_fork = _Fork()


def _before_fork() -> None:
    # What is half imported or locked at the fork would stay so in the child.
    _fork.done = threading.Event()
    if _current is not None:
        _current.pause_until(_fork.done)


def _after_fork_in_parent() -> None:
    _fork.done.set()


def _after_fork_in_child() -> None:
    # A forked child has the parent's objects but not its threads. The parent's loop must stay
    # untouched, even by the garbage collector: its selector is shared with the parent.
    global _lock, _current, _exiting
    if _current is not None:
        _current.loop.detach_after_fork()
        _abandoned.append(_current)
    _lock = threading.Lock()
    _current, _exiting = None, False


@atexit.register
def _stop_at_exit() -> None:
    global _exiting
    _exiting = True
    if _current is not None:
        _current.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
