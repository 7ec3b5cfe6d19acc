"""Async scheduling on a CPU, where vLLM does not use it by itself: the next step is prepared while
one is computed, as on a GPU.

Replaces `WorkerExtension` (`worker_extension_cls`), so that the engine core's process imports it
before it creates the scheduler.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig

from modal_backend.engines.vllm.extension import WorkerExtension

VllmConfig.max_concurrent_batches = property(lambda config: 2)


class Ahead(WorkerExtension):
    """`WorkerExtension` that reports whether it worked."""

    def steps_ahead(self) -> int:
        """Most steps that are computed or queued."""
        concurrent: Any = self.vllm_config.max_concurrent_batches  # type: ignore[attr-defined]
        return int(concurrent)
