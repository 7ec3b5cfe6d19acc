"""vLLM's worker with random weights of integers too: `load_format="dummy"` leaves those as they
are in memory, which could make all vectors equal."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.model_loader import dummy_loader

from modal_backend.engines.vllm.worker import FullCudaGraphWorker


class RandomIntegersWorker(FullCudaGraphWorker):
    """Fills packed weights at random; scales, like all floats, are vLLM's."""

    def load_model(self, *arguments: Any, **named: Any) -> None:
        of_vllm = dummy_loader.initialize_single_dummy_weight

        def initialize(parameter: torch.Tensor) -> None:
            of_vllm(parameter)
            if parameter.dtype == torch.int32:
                generator = torch.Generator(parameter.device).manual_seed(parameter.numel())
                parameter.random_(-(2**31), 2**31 - 1, generator=generator)

        dummy_loader.initialize_single_dummy_weight = initialize
        super().load_model(*arguments, **named)
