"""A thread that computes, for the tasks of an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_Job = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class ComputeThread:
    """A daemon thread that runs one function after the other.

    Not an executor of the standard library: those refuse work as soon as the main thread has
    ended, though other threads of the program may still be embedding.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """The result of `function(*args)`. Cancelled before its turn, it never runs."""
        future: Future[T] = Future()
        self._jobs.put((future, function, args))
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """Let what runs finish, then end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, function, args = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*args))
            except BaseException as error:  # noqa: BLE001 (raised where it is awaited)
                future.set_exception(error)
            del job, future, function, args
