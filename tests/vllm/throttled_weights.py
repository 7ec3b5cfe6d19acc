"""A vLLM plugin that limits how fast the engine core reads weights: storage that is slow.

vLLM loads it in all its processes, by the entry point that `install` writes. `BYTES_PER_SECOND`
sets the limit; without that variable nothing changes.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

BYTES_PER_SECOND = "THROTTLED_BYTES_PER_SECOND"
BEGUN = "throttled: reading"
"""Starts the line that a process prints when it begins to read."""


def install(folder: Path) -> Path:
    """Make `folder` one that provides the plugin wherever it is in the search path."""
    about = folder / "throttled_weights-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: throttled-weights\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nthrottled_weights = throttled_weights:throttle\n"
    )
    (folder / "throttled_weights.py").symlink_to(__file__)
    return folder


def throttle() -> None:
    """Slow down the reads of tensors in this process."""
    if not (limit := os.environ.get(BYTES_PER_SECOND)):
        return
    from vllm.model_executor.model_loader import weight_utils

    open_file = weight_utils.safe_open

    class Throttled:
        def __init__(self, path: str, **options: Any) -> None:
            self._file = open_file(path, **options)

        def __enter__(self) -> Throttled:
            self._opened = self._file.__enter__()
            print(f"{BEGUN} at {limit} bytes/s", file=sys.stderr, flush=True)
            return self

        def __exit__(self, *error: Any) -> Any:
            return self._file.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self._opened.keys())

        def get_tensor(self, name: str) -> Any:
            tensor = self._opened.get_tensor(name)
            time.sleep(tensor.nbytes / float(limit))
            return tensor

    weight_utils.safe_open = Throttled
