"""What LlamaIndex's own loop over batches does not tell them: whose they are.

The loop is used where its cache or its rate limiter is. It shows a batch neither its place in the
caller's list nor the caller's progress bar, and lets the others run on, unseen and paid for, when
one fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from kalm_integrations.errors import InvalidInputError, InvalidText
from kalm_integrations.progress import Progress


class _Call:
    """One call of the caller's, and the tasks in which LlamaIndex runs its batches."""

    def __init__(self, texts: list[str], advance: Progress | None) -> None:
        self.texts = texts
        self.advance = advance
        self._tasks: set[asyncio.Task[Any]] = set()
        self._over = False

    def join(self) -> None:
        """Count the running task among them."""
        if self._over:
            raise asyncio.CancelledError
        if task := asyncio.current_task():
            self._tasks.add(task)

    def end(self) -> None:
        """Cancel those that still run, or have yet to."""
        self._over = True
        if self._tasks:
            for task in self._tasks - {asyncio.current_task()}:
                task.cancel()


_call: ContextVar[_Call | None] = ContextVar("kalm_call", default=None)


@contextmanager
def batches_of(texts: list[str], advance: Progress | None) -> Iterator[None]:
    """Inside, batches are parts of `texts`, and end with the block."""
    call = _Call(texts, advance)
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)
        call.end()


@contextmanager
def batch(texts: list[str]) -> Iterator[Progress | None]:
    """One batch; yields what moves the caller's bar on.

    Raises:
        InvalidInputError: Names a bad text by its places in the caller's list.
    """
    call = _call.get()
    try:
        yield None if call is None else call.advance
    except InvalidInputError as error:
        bad = {texts[bad.index]: bad.reason for bad in error.invalid}
        if call is None or not bad:
            raise
        invalid = [InvalidText(i, bad[text]) for i, text in enumerate(call.texts) if text in bad]
        raise type(error).of(invalid) from error


def join_call() -> None:
    """The running task ends with the call, if there is one."""
    if call := _call.get():
        call.join()
