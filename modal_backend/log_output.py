"""Output that never blocks: a service goes on though nobody can read its log."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, Final, TextIO, cast

_MAX_QUEUED: Final = 5_000
_FLUSH_SECONDS: Final = 1.0


class NonBlockingStream:
    """A text stream that a thread writes to its file descriptor. Text is dropped while too much
    waits, as behind a full pipe that nobody reads, and where it cannot be written, as to a full
    disk. All else is the stream's own.

    Args:
        stream: `sys.stdout` or `sys.stderr`.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._fd = stream.fileno()
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._dropped = 0
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="kalm-log", daemon=True)
        self._thread.start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Take `text`; never waits."""
        if os.getpid() != self._process:  # a fork, which has no such thread
            return self._stream.write(text)
        if self._queue.qsize() < _MAX_QUEUED:
            self._queue.put(text)
        else:
            self._dropped += 1
        return len(text)

    def flush(self) -> None:
        """Nothing: what is written is on its way."""

    def close(self) -> None:
        """Write what is left, as far as that takes no longer than a second."""
        self._queue.put(None)
        self._thread.join(_FLUSH_SECONDS)

    def _run(self) -> None:
        while (text := self._queue.get()) is not None:
            self._write(text)
            if self._dropped and self._queue.empty():
                dropped, self._dropped = self._dropped, 0
                self._write(f"{dropped} messages were lost here: the log was not read.\n")

    def _write(self, text: str) -> None:
        data = text.encode(self._stream.encoding or "utf-8", "replace")
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._fd, data) :]


@contextlib.contextmanager
def non_blocking_output() -> Iterator[None]:
    """Let standard output and error never block while the block runs."""
    real = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    replaced: dict[str, NonBlockingStream] = {}
    for name, stream in real.items():
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no file descriptor
            stream.flush()
            replaced[name] = NonBlockingStream(stream)
            setattr(sys, name, cast("TextIO", replaced[name]))
    try:
        yield
    finally:
        for name, stream in replaced.items():
            setattr(sys, name, real[name])
            stream.close()
