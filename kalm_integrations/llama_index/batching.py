"""Connects the batches of LlamaIndex's own loop with the call that they belong to.

The loop is used with LlamaIndex's cache or rate limiter. It passes a batch neither its position in
the caller's list nor the progress bar, and it does not cancel other batches when one fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from kalm_integrations.errors import InvalidInputError, InvalidText
from kalm_integrations.progress import Progress
from kalm_integrations.result import log_truncated


class _Call:
    """One call, and the tasks in which LlamaIndex runs its batches."""

    def __init__(self, texts: list[str], advance: Progress | None) -> None:
        self.texts = texts
        self.advance = advance
        self.tasks: set[asyncio.Task[Any]] = set()
        self.truncated: set[str] = set()
        """Texts that were cut."""
        self.over = False


_call: ContextVar[_Call | None] = ContextVar("kalm_call", default=None)


@contextmanager
def batches_of(texts: list[str], advance: Progress | None) -> Iterator[None]:
    """In this block, batches are parts of `texts`; at its end, they are cancelled."""
    call = _Call(texts, advance)
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)
        call.over = True
        for task in call.tasks - {_current_task()}:
            task.cancel()
        if cut := [index for index, text in enumerate(texts) if text in call.truncated]:
            log_truncated(cut)


@contextmanager
def batch(texts: list[str]) -> Iterator[dict[str, Any]]:
    """One batch; yields the callbacks for `KalmClient.embed_to_lists`.

    Raises:
        InvalidInputError: Names an invalid text by its indices in the caller's list.
    """
    call = _call.get()
    if call is None:
        yield {}
        return
    if call.over:
        raise asyncio.CancelledError
    if task := _current_task():
        call.tasks.add(task)

    def on_truncated(indices: Sequence[int]) -> None:
        call.truncated.update(texts[index] for index in indices)

    try:
        yield {"on_progress": call.advance, "on_truncated": on_truncated}
    except InvalidInputError as error:
        bad = {texts[bad.index]: bad.reason for bad in error.invalid}
        if not bad.keys() <= {*call.texts} or not bad:  # a subclass has changed them
            error.add_note("Indices count the texts that _get_text_embeddings got.")
            raise
        invalid = [InvalidText(i, bad[text]) for i, text in enumerate(call.texts) if text in bad]
        located = type(error).of(invalid)
        if len(texts) == len(call.texts):
            located.partial = error.partial
        raise located from error


def _current_task() -> asyncio.Task[Any] | None:
    """The running task; None outside of event loops."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
