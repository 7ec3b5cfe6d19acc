"""vLLM's worker on a GPU, which captures small steps as one CUDA graph each.

For pooling models vLLM captures only the pieces between attention layers, 49 for KaLM, and a query
waits while a CPU launches them one by one. FlashAttention 3, which vLLM uses on Hopper cards, can
be part of a graph. vLLM's configuration rules that out for all pooling models, so it is changed
here, in the engine core's process, before the model is loaded.
"""

from __future__ import annotations

from typing import Any

from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.worker.gpu_worker import Worker


class FullCudaGraphWorker(Worker):  # type: ignore[misc]  # vLLM is not installed everywhere
    """Captures the whole model in each CUDA graph where the attention supports it."""

    def init_device(self) -> None:
        use_full_graphs(self.vllm_config, FlashAttentionMetadataBuilder._cudagraph_support)
        super().init_device()


def use_full_graphs(config: Any, attention: AttentionCGSupport) -> None:
    """Switch vLLM's `config` from piecewise to full CUDA graphs if `attention` supports them."""
    compilation = config.compilation_config
    if compilation.cudagraph_mode != CUDAGraphMode.PIECEWISE:  # none in eager mode
        return
    if attention == AttentionCGSupport.ALWAYS:
        compilation.cudagraph_mode = CUDAGraphMode.FULL
        # Splitting a text's keys helps decoding, one token at a time; here it only costs.
        config.attention_config.flash_attn_max_num_splits_for_cuda_graph = 1
