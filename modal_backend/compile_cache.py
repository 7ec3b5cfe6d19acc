"""vLLM's compiled kernels in a Volume, which save a minute of each load.

vLLM works on local disk, and files are copied: a mounted Volume cannot be reloaded while files of
it are open, which a snapshot would keep.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

VOLUME: Final = ".cache/vllm-jit"
"""Mount point of the Volume, below the home directory."""
_LOCAL: Final = ".cache/vllm"  # vLLM's default


def fetch() -> None:
    """Copy the Volume to vLLM's cache. A failure only makes the load slower."""
    _copy(Path.home() / VOLUME, Path.home() / _LOCAL)


def store() -> bool:
    """Copy new files to the Volume; return whether there were any, which need a commit."""
    return _copy(Path.home() / _LOCAL, Path.home() / VOLUME)


def _copy(source: Path, target: Path) -> bool:
    copied = False
    try:
        for path in sorted(source.rglob("*")):
            copy = target / path.relative_to(source)
            if path.is_file() and not (copy.is_file() and _is_current(copy, path)):
                copy.parent.mkdir(parents=True, exist_ok=True)
                partial = copy.with_name(f"{copy.name}.half")  # never seen under its own name
                shutil.copy2(path, partial)
                partial.replace(copy)
                copied = True
    except OSError as error:
        log.warning("compiled kernels were not copied to %s: %s", target, error)
    return copied


def _is_current(copy: Path, original: Path) -> bool:
    theirs, ours = copy.stat(), original.stat()
    return theirs.st_size == ours.st_size and theirs.st_mtime >= ours.st_mtime
