"""vLLM's worker on a GPU, whose small steps are one CUDA graph each.

Of a pooling model vLLM makes graphs of the pieces between attention layers, 49 for KaLM, and a
query waits for a CPU that launches them one by one. FlashAttention 3, which vLLM uses on a Hopper
card, can be part of a graph; vLLM's configuration rules it out for all pooling models, hence its
change here, in the engine core's process, before the model is loaded.
"""

from __future__ import annotations

from typing import Any

from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.worker.gpu_worker import Worker


class WholeGraphs(Worker):  # type: ignore[misc]  # vLLM is not installed everywhere
    """vLLM's worker, which makes graphs of the whole model where attention allows it."""

    def init_device(self) -> None:
        """See vLLM's."""
        make_whole(self.vllm_config, FlashAttentionMetadataBuilder._cudagraph_support)
        super().init_device()


def make_whole(config: Any, attention: AttentionCGSupport) -> None:
    """Change the kind of CUDA graphs.

    Args:
        config: vLLM's.
        attention: What the attention of this GPU can be part of.
    """
    compilation = config.compilation_config
    if compilation.cudagraph_mode != CUDAGraphMode.PIECEWISE:  # none, where it runs eagerly
        return
    if attention == AttentionCGSupport.ALWAYS:
        compilation.cudagraph_mode = CUDAGraphMode.FULL
        # A text's keys are split for decoding, one token at a time; here it would only cost.
        config.attention_config.flash_attn_max_num_splits_for_cuda_graph = 1
