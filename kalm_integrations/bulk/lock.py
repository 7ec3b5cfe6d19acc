"""One process at a time in a job's output. The lock goes with the process, however that ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from kalm_integrations.errors import ConfigurationError

_LOCK: Final = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of a job's output, while the block runs.

    Raises:
        ConfigurationError: One is at work there.
    """
    with (folder / _LOCK).open("w") as file:
        if not _lock(file):
            raise ConfigurationError(f"another process is at work in {folder}.")
        yield


def _lock(file: IO[str]) -> bool:
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        return False
    return True
