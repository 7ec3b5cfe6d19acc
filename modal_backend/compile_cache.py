"""vLLM's compiled kernels, kept in a volume: they spare a minute of each load.

vLLM works on local disk, and the volume is copied from and to: a mounted volume cannot be reloaded
while files of it are open, which a snapshot would keep.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

VOLUME: Final = ".cache/vllm-jit"
"""Where the volume is, below the container's home."""
_LOCAL: Final = ".cache/vllm"  # where vLLM looks by itself


def fetch() -> None:
    """Copy what the volume has to where vLLM looks. A cache that fails is only slow."""
    _copy(Path.home() / VOLUME, Path.home() / _LOCAL)


def store() -> bool:
    """Copy what is new to the volume.

    Returns:
        Whether anything was: then the volume wants to be committed.
    """
    return _copy(Path.home() / _LOCAL, Path.home() / VOLUME)


def _copy(source: Path, target: Path) -> bool:
    copied = False
    try:
        for path in sorted(source.rglob("*")):
            copy = target / path.relative_to(source)
            if path.is_file() and not (copy.is_file() and _same(path, copy)):
                copy.parent.mkdir(parents=True, exist_ok=True)
                half = copy.with_name(f"{copy.name}.half")  # never seen under its own name
                shutil.copy2(path, half)
                half.replace(copy)
                copied = True
    except OSError as error:
        log.warning("compiled kernels were not copied to %s: %s", target, error)
    return copied


def _same(a: Path, b: Path) -> bool:
    mine, other = a.stat(), b.stat()
    return mine.st_size == other.st_size and mine.st_mtime <= other.st_mtime
