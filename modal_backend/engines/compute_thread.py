"""A thread that computes for the tasks of an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from kalm_integrations.native_threads import NativeFuture, NativeThread, new_queue

T = TypeVar("T")


class ComputeThread:
    """A daemon thread that runs one function at a time.

    The executors of the standard library refuse work once the main thread has ended, although
    other threads of the program may still be embedding.
    """

    def __init__(self, name: str) -> None:
        self._calls = new_queue()
        self._thread = NativeThread(self._run, name)

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Return `function(*args)`. It never runs if the caller is cancelled before it starts."""
        future: NativeFuture[T] = NativeFuture()
        self._calls.put((future, lambda: function(*args)))
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """Finish what was started or queued, then end the thread."""
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 (raised in the caller)
                future.set_exception(error)
            del call, future, function
