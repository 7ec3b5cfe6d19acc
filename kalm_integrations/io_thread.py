"""The one background thread of a process that owns the event loop and all connections.

Sync callers, async callers of any loop, Jupyter, threads and worker processes all hand their
coroutines to it, so that none of them needs a loop of its own, and a second `asyncio.run` finds
the connections alive. It starts with the first call, never on import or construction.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

_STOP_TIMEOUT = 5.0  # seconds that the interpreter's exit waits for calls to unwind


class Closable(Protocol):
    """Something that is open on the loop."""

    async def close(self) -> None:
        """Close it; once it is closed, do nothing."""
        ...


class IOThread:
    """A daemon thread that runs an event loop until the process ends."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.resources: set[Closable] = set()
        """What is open on the loop, to be closed when it ends."""
        self._thread = threading.Thread(target=self._run, name="kalm-io", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `coroutine` on the thread, with the caller's context variables.

        Cancelling the future cancels the coroutine.

        Raises:
            RuntimeError: The caller is the thread itself, which would wait for itself, or the
                interpreter is ending.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("a blocking call on kalm's own I/O thread would never return")
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        except RuntimeError:
            coroutine.close()
            raise RuntimeError("the interpreter is ending: nothing can be embedded now") from None

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

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        closing = [resource.close() for resource in self.resources]
        self.loop.run_until_complete(asyncio.gather(*tasks, *closing, return_exceptions=True))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


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


def _forget_in_child() -> None:
    # A forked child has the parent's objects but not its threads. The parent's loop must stay
    # untouched, even by the garbage collector: its selector is shared with the parent.
    global _lock, _current
    if _current is not None:
        _abandoned.append(_current)
    _lock = threading.Lock()
    _current = None


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
    os.register_at_fork(after_in_child=_forget_in_child)
