"""Output that never blocks, so that a service continues while nobody reads its log."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from queue import SimpleQueue
from typing import Any, Final, TextIO, cast

_MAX_QUEUED: Final = 5_000
_FLUSH_SECONDS: Final = 1.0


class NonBlockingStream:
    """A text stream whose text a thread writes to the file descriptor. Text is dropped while too
    much is queued (a full pipe that nobody reads) and if it cannot be written (a full disk).

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
        """Queue `text` without waiting."""
        if os.getpid() != self._process:  # a fork does not have the thread
            return self._stream.write(text)
        if self._queue.qsize() < _MAX_QUEUED:
            self._queue.put(text)
        else:
            self._dropped += 1
        return len(text)

    def flush(self) -> None:
        """Do nothing: the thread writes at once."""

    def close(self) -> None:
        """Write the queued text for up to a second."""
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


def never_block_on_output() -> None:
    """Replace standard output and error until the process ends."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it has no file
            stream.flush()
            replacement = NonBlockingStream(stream)
            setattr(sys, name, cast("TextIO", replacement))
            atexit.register(replacement.close)
