"""Threads of the operating system, and waiting for them, whatever gevent has patched.

gevent replaces threads, locks, queues and sockets by its own, which wait for its hub. The event
loop and the embedded engine run on real threads instead; only callers wait through the hub.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from importlib import import_module
from queue import Empty
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from queue import SimpleQueue

T = TypeVar("T")


def original(module: str, name: str) -> Any:
    """`module.name`, as it was before gevent patched it."""
    if gevent := sys.modules.get("gevent.monkey"):
        return gevent.get_original(module, name)
    return getattr(import_module(module), name)


def is_patched(module: str = "") -> bool:
    """Whether gevent has patched `module`, or anything."""
    gevent = sys.modules.get("gevent.monkey")
    if gevent is None:
        return False
    return bool(gevent.is_module_patched(module) if module else gevent.is_anything_patched())


class Event(Protocol):
    """The part of `threading.Event` that callers need."""

    def set(self) -> None:
        """Wake the caller; from any thread."""

    def clear(self) -> None:
        """Forget `set`."""

    def wait(self) -> object:
        """Wait until `set` is called."""


class _HubEvent:
    """An event that lets other greenlets of the waiting thread run.

    gevent's own does not count as work of the hub, which may give up waiting for another thread.
    """

    def __init__(self) -> None:
        self._event = import_module("gevent.event").Event()
        self._lock = original("_thread", "allocate_lock")()
        self._signal: Any = None
        self._is_set = False

    def set(self) -> None:
        with self._lock:
            self._is_set = True
            if self._signal is not None:
                self._signal.send()

    def clear(self) -> None:
        self._is_set = False

    def wait(self) -> None:
        signal = import_module("gevent").get_hub().loop.async_()
        self._event.clear()
        signal.start(self._event.set)
        with self._lock:
            self._signal = signal
        try:
            if not self._is_set:
                self._event.wait()
        finally:
            with self._lock:
                self._signal = None
            signal.stop()
            signal.close()


def new_event() -> Event:
    """An event that any thread may set. Under gevent, waiting for it lets other greenlets run."""
    gevent = sys.modules.get("gevent")
    if gevent and (is_patched() or isinstance(gevent.getcurrent(), gevent.Greenlet)):
        return _HubEvent()
    return threading.Event()


class NativeFuture(Future[T]):
    """A future that real threads complete. Its own lock would be gevent's, which may make a thread
    wait for the hub of another; use `wait_for`, not `result`, to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self._condition = threading.Condition(original("_thread", "RLock")())


def wait_for(future: Future[T]) -> T:
    """The result of `future`. Under gevent, other greenlets run in the meantime."""
    done = new_event()
    future.add_done_callback(lambda _: done.set())
    done.wait()
    return future.result()


def new_queue() -> SimpleQueue[Any]:
    """A queue between real threads."""
    queue: SimpleQueue[Any] = original("queue", "SimpleQueue")()
    return queue


class NativeThread:
    """A daemon thread of the operating system, started at once."""

    def __init__(self, run: Callable[[], object], name: str) -> None:
        self._ended = new_queue()
        self._run = run
        self._ident = 0
        self._is_registered = not is_patched("threading")
        if not self._is_registered:
            original("_thread", "start_new_thread")(self._main, ())
        else:
            threading.Thread(target=self._main, name=name, daemon=True).start()

    def is_current(self) -> bool:
        """Whether the caller runs on it."""
        return bool(original("_thread", "get_ident")() == self._ident)

    def join(self, timeout: float | None = None) -> None:
        """Wait until it ends. Under gevent, other greenlets wait too."""
        with suppress(Empty):
            self._ended.get(timeout=timeout)
            self._ended.put(None)  # for the next caller

    def _main(self) -> None:
        self._ident = original("_thread", "get_ident")()
        if is_patched("threading"):  # after a fork, Python's own `is_alive` fails in such a thread
            process, thread = os.getpid(), threading.current_thread()
            thread.is_alive = lambda: bool(self._ident) and os.getpid() == process  # type: ignore[method-assign]
        try:
            self._run()
        finally:
            self._ident = 0
            self._ended.put(None)
            if self._is_registered and is_patched("threading"):
                # Patched since then, Python's end of a thread would print a traceback.
                new_queue().get()  # until the process exits
