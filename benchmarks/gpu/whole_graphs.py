"""An attempt: CUDA graphs of the whole model, where vLLM makes them of a pooling model's pieces.

vLLM refuses them for pooling models in general, and again in the engine core's process. This stands
in for `Extension` and is imported there, before graphs are made.
"""

from __future__ import annotations

from typing import Any

from vllm.config import CompilationConfig, CUDAGraphMode

from modal_backend.engines.vllm.extension import Extension

_resolve = CompilationConfig.resolve_cudagraph_mode_and_sizes


def _whole(self: Any, *arguments: Any, **named: Any) -> Any:
    if self.cudagraph_mode != CUDAGraphMode.NONE:
        self.cudagraph_mode = CUDAGraphMode.FULL
    return _resolve(self, *arguments, **named)


CompilationConfig.resolve_cudagraph_mode_and_sizes = _whole


class WholeGraphs(Extension):
    """Nothing else differs."""
