"""What vLLM's worker is asked to do for us. Runs in the engine core's process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class Extension:
    """Added to vLLM's worker class by `worker_extension_cls` (vLLM docs, "RLHF utilities")."""

    kalm_host_copies: tuple[Any, ...] = ()

    def keep_host_copies(self) -> None:
        """Before waking: hold on to the host memory that the weights slept in. vLLM would wait for
        every piece to be freed, a second for 10 GiB."""
        from vllm.device_allocator import get_mem_allocator_instance
        from vllm.platforms import current_platform

        if not current_platform.is_sleep_mode_available():  # a sleep that moves no memory
            return
        held = get_mem_allocator_instance().pointer_to_data.values()
        self.kalm_host_copies = tuple(allocation.cpu_backup_tensor for allocation in held)

    def free_host_copies(self) -> None:
        """Before sleeping again: they would be there twice."""
        self.kalm_host_copies = ()

    def inspect_model(self) -> dict[str, Any]:
        """What was loaded; the front-end's configuration says what was to be. Built-in types only:
        it travels between processes."""
        model = self.get_model()  # type: ignore[attr-defined]
        modules = list(model.modules())
        pooler = model.pooler.poolers_by_task["embed"]
        windows = {
            getattr(module, "sliding_window", None) for module in modules if _attention(module)
        }
        return {
            "model_class": type(model).__name__,
            "pooling": type(pooler.pooling).__name__,
            "activation": type(getattr(pooler.head, "activation", None)).__name__,
            "projector": getattr(pooler.head, "projector", None) is not None,
            "attention": sorted({_name(m.attn_type) for m in modules if _attention(m)}),
            "windows": sorted(window for window in windows if window),
            "dtypes": sorted({str(weight.dtype) for weight in _weights(modules)}),
            "linear": sorted({_scheme(m) for m in modules if hasattr(m, "quant_method")} - {""}),
            "cuda_graphs": _graphs(self.model_runner),  # type: ignore[attr-defined]
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }


def _graphs(runner: Any) -> str:
    """Of what CUDA graphs are made; vLLM's configuration no longer says what it did then."""
    for holder in ("cudagraph_manager", "cudagraph_dispatcher"):  # vLLM's new runner, its old one
        if (graphs := getattr(runner, holder, None)) is not None:
            return str(graphs.cudagraph_mode.name)
    return "NONE"


def _weights(modules: Iterable[Any]) -> Iterator[Any]:
    """All parameters that are floats, but not the biases of linear layers.

    Where a processor has AMX, vLLM widens those to float32, which changes none of their values.
    Whatever else has a type of its own belongs to the identity.
    """
    for module in modules:
        linear = hasattr(module, "quant_method")
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not (linear and name == "bias"):
                yield parameter


def _attention(module: Any) -> bool:
    return hasattr(module, "attn_type") and hasattr(module, "impl")


def _name(kind: Any) -> str:
    return str(getattr(kind, "value", kind))


def _scheme(layer: Any) -> str:
    """How a linear layer multiplies: its weights' form, and its inputs'."""
    method = layer.quant_method
    if hasattr(layer, "num_embeddings"):
        return ""  # an embedding table, which is only looked up
    if not hasattr(method, "fp8_linear"):
        return str(type(method).__name__)
    if getattr(method, "use_marlin", False):  # the card does not compute in fp8
        return "fp8 weights"
    per_token = method.activation_quant_key.scale.group_shape.is_per_token()
    return f"fp8 weights per tensor, inputs per {'token' if per_token else 'tensor'}"
