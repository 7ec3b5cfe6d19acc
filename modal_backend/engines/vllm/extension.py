"""Methods that the engine calls in vLLM's worker, in the engine core's process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class WorkerExtension:
    """Added to vLLM's worker class by `worker_extension_cls` (vLLM docs, "RLHF utilities")."""

    kalm_host_copies: tuple[Any, ...] = ()

    def keep_host_copies(self) -> None:
        """Before waking: keep the host memory that holds the sleeping weights. Otherwise vLLM waits
        until every piece is freed, a second for 10 GiB."""
        from vllm.device_allocator import get_mem_allocator_instance
        from vllm.platforms import current_platform

        if not current_platform.is_sleep_mode_available():  # a sleep that moves no memory
            return
        allocations = get_mem_allocator_instance().pointer_to_data.values()
        self.kalm_host_copies = tuple(each.cpu_backup_tensor for each in allocations)

    def free_host_copies(self) -> None:
        """Before sleeping again: otherwise the weights are in host memory twice."""
        self.kalm_host_copies = ()

    def inspect_model(self) -> dict[str, Any]:
        """Describe the loaded model in built-in types, which can travel between processes. The
        front-end's configuration describes only the requested one."""
        model = self.get_model()  # type: ignore[attr-defined]
        modules = list(model.modules())
        attention = [m for m in modules if hasattr(m, "attn_type") and hasattr(m, "impl")]
        pooler = model.pooler.poolers_by_task["embed"]
        return {
            "model_class": type(model).__name__,
            "pooling": type(pooler.pooling).__name__,
            "activation": type(getattr(pooler.head, "activation", None)).__name__,
            "projector": getattr(pooler.head, "projector", None) is not None,
            "attention": sorted(
                {str(getattr(m.attn_type, "value", m.attn_type)) for m in attention}
            ),
            "windows": sorted({getattr(m, "sliding_window", None) or 0 for m in attention} - {0}),
            "dtypes": sorted({str(weight.dtype) for weight in _weights(modules)}),
            "linear": sorted({_scheme(m) for m in modules if _is_linear(m)} - {""}),
            "cuda_graphs": _graph_mode(self.model_runner),  # type: ignore[attr-defined]
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }


def _graph_mode(runner: Any) -> str:
    """The mode in use, which vLLM's configuration no longer states."""
    for holder in ("cudagraph_manager", "cudagraph_dispatcher"):  # vLLM's new and old runner
        if (graphs := getattr(runner, holder, None)) is not None:
            return str(graphs.cudagraph_mode.name)
    return "NONE"


def _weights(modules: Iterable[Any]) -> Iterator[Any]:
    """All floating-point parameters except the biases of linear layers.

    With AMX, vLLM widens those to float32, which changes none of their values. Any other parameter
    with a different type belongs to the identity.
    """
    for module in modules:
        linear = hasattr(module, "quant_method")
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not (linear and name == "bias"):
                yield parameter


def _is_linear(module: Any) -> bool:
    """Whether it multiplies by weights. Attention has a method too, for the type of its cache."""
    return hasattr(module, "quant_method") and not hasattr(module, "attn_type")


def _scheme(layer: Any) -> str:
    """The types in which a linear layer multiplies its weights and inputs."""
    method = layer.quant_method
    if hasattr(layer, "num_embeddings"):
        return ""  # an embedding table, which is only looked up
    packed = getattr(layer, "scheme", None)  # of compressed-tensors
    if packed is not None and hasattr(packed, "num_bits"):
        groups = f"groups of {packed.group_size}" if packed.group_size > 0 else "per channel"
        zero_points = "" if packed.symmetric else ", zero points"
        return f"int{packed.num_bits} weights, {groups}{zero_points}"
    if not hasattr(method, "fp8_linear"):
        return str(type(method).__name__)
    if getattr(method, "use_marlin", False):  # the card does not compute in fp8
        return "fp8 weights"
    per_token = method.activation_quant_key.scale.group_shape.is_per_token()
    return f"fp8 weights per tensor, inputs per {'token' if per_token else 'tensor'}"
