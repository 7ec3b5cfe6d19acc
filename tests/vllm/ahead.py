"""Schedules ahead on a CPU too, where vLLM does not by itself: the next step is made up while one
is still computed, as on a GPU.

Stands in for `Extension` (`worker_extension_cls`), so that it is imported in the engine core's
process, before the scheduler is made.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig

from modal_backend.engines.vllm.extension import Extension

VllmConfig.max_concurrent_batches = property(lambda config: 2)


class Ahead(Extension):
    """`Extension`, and whether it worked."""

    def steps_ahead(self) -> int:
        """Most steps that are computed or queued."""
        concurrent: Any = self.vllm_config.max_concurrent_batches  # type: ignore[attr-defined]
        return int(concurrent)
