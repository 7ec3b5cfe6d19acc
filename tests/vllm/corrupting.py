"""A worker that corrupts and repairs the loaded model on request.

Replaces `WorkerExtension` (`worker_extension_cls`), so it runs in the engine core's process. It
does to real memory what a restore, or a wrong load that vLLM does not notice, may do: to the
weights, to the tables of the rotary embedding, to one bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from modal_backend.engines.vllm.extension import WorkerExtension

LAYER = 3
"""The one that is corrupted, and the one of which a whole layer is: both of the sliding window."""
OTHER = 1
LINEAR = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


class Model:
    """A tiny Gemma 3 as vLLM holds it, with what it was like before."""

    def __init__(self, model: Any) -> None:
        self.modules = dict(model.named_modules())
        self.tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self._kept = {name: tensor.clone() for name, tensor in self.tensors.items()}
        self._kept_products: dict[Any, Any] = {}
        self._pooler = model.pooler

    def change(self, part: str, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Of all tensors whose names contain `part`."""
        found = [tensor for name, tensor in self.tensors.items() if part in f".{name}"]
        assert found, f"nothing is called {part}"
        for tensor in found:
            tensor.data.copy_(to(tensor.data))

    def weight(self, layer: int, linear: str) -> torch.Tensor:
        """A linear layer's weight. On a CPU, vLLM packs it and drops what was packed."""
        module = self._linear(layer, linear)
        table = self.tensors["model.embed_tokens.weight"]
        identity = torch.eye(module.input_size, dtype=table.dtype)
        return module.cpu_linear(identity, module.weight, None).T.contiguous()

    def set_weight(self, layer: int, linear: str, weight: torch.Tensor) -> None:
        """Let a linear layer multiply by `weight`."""
        module = self._linear(layer, linear)
        self._kept_products.setdefault(module, module.cpu_linear)
        module.cpu_linear = lambda x, _, bias: torch.nn.functional.linear(x, weight, bias)

    def change_rows(self, to: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> None:
        """Of what the pooler makes of a step: a vector for each text that ends in it."""
        pooler = self._pooler

        def forward(*args: Any, **kwargs: Any) -> list[torch.Tensor | None]:
            rows = list(type(pooler).forward(pooler, *args, **kwargs))
            ended = [number for number, row in enumerate(rows) if row is not None]
            for number, row in zip(ended, to([rows[number] for number in ended]), strict=True):
                rows[number] = row
            return rows

        pooler.forward = forward

    def mend(self) -> None:
        """As it was."""
        self._pooler.__dict__.pop("forward", None)
        for name, tensor in self.tensors.items():
            tensor.data.copy_(self._kept[name])
        for module, product in self._kept_products.items():
            module.cpu_linear = product

    def _linear(self, layer: int, linear: str) -> Any:
        return self.modules[f"model.layers.{layer}.{linear}"]


class Corrupting(WorkerExtension):
    """`WorkerExtension`, and corruption by name."""

    def corrupt_model(self, how: str) -> None:
        """One of `CORRUPTIONS`; what an earlier one did is mended before."""
        if not hasattr(self, "_healthy"):
            self._healthy = Model(self.get_model())  # type: ignore[attr-defined]
        self._healthy.mend()
        # A NaN stays in blocks that are given to other texts, and what is masked is multiplied
        # by zero.
        for cache in self.model_runner.kv_caches:  # type: ignore[attr-defined]
            cache.zero_()
        if how:
            (CORRUPTIONS | SHAPES)[how](self._healthy)

    def inspect_model_as(self, dtype: str, part: str = "") -> dict[str, Any]:
        """`inspect_model` of the model with those parameters in another dtype whose names
        `part` is found in, a regular expression."""
        model = self.get_model()  # type: ignore[attr-defined]
        named = model.named_parameters()
        kept = [(parameter, parameter.data) for name, parameter in named if re.search(part, name)]
        assert kept, f"nothing is called {part}"
        for parameter, data in kept:
            parameter.data = data.to(getattr(torch, dtype))
        try:
            return self.inspect_model()
        finally:
            for parameter, data in kept:
                parameter.data = data


def _one_layer(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Model], None]:
    def corrupt(model: Model) -> None:
        for linear in LINEAR:
            model.set_weight(LAYER, linear, change(model.weight(LAYER, linear)))

    return corrupt


def _every(linear: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Model], None]:
    def corrupt(model: Model) -> None:
        for layer in range(6):
            model.set_weight(layer, linear, change(model.weight(layer, linear)))

    return corrupt


def _swapped(model: Model) -> None:
    for linear in LINEAR:
        one, other = model.weight(LAYER, linear), model.weight(OTHER, linear)
        model.set_weight(LAYER, linear, other)
        model.set_weight(OTHER, linear, one)


def _tensor(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Model], None]:
    return lambda model: model.change(part, change)


def _noisy(strength: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        size = weight.float().square().mean().sqrt() * strength
        return (weight.float() + size * drawn).to(weight.dtype)

    return change


def _one_bit(model: Model) -> None:
    """The highest bit of an exponent: 0.02 becomes 6e36."""
    weight = model.weight(LAYER, "mlp.down_proj")
    assert weight.dtype == torch.bfloat16
    weight.view(torch.int16)[0, 0] ^= 0x4000
    model.set_weight(LAYER, "mlp.down_proj", weight)


def _one_nan(weight: torch.Tensor) -> torch.Tensor:
    changed = weight.clone()
    changed[0, 0] = float("nan")
    return changed


def _rotary(layer: int, base: float) -> Callable[[Model], None]:
    """Of all layers of the same kind: they share a table."""

    def corrupt(model: Model) -> None:
        embedding = model.modules[f"model.layers.{layer}.self_attn.rotary_emb"]
        own, embedding.base = embedding.base, base
        table = embedding._compute_cos_sin_cache()
        embedding.base = own
        model.change(f"layers.{layer}.self_attn.rotary_emb.cos_sin_cache", lambda _: table)

    return corrupt


def _rows(to: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> Callable[[Model], None]:
    return lambda model: model.change_rows(to)


def _all_zero(model: Model) -> None:
    for linear in LINEAR:
        _every(linear, torch.zeros_like)(model)
    model.change("weight", torch.zeros_like)


CORRUPTIONS: dict[str, Callable[[Model], None]] = {
    "nothing: a copy of the same weights": _one_layer(torch.clone),
    "every weight zero": _all_zero,
    "one weight NaN": _one_layer(_one_nan),
    "one bit of one weight": _one_bit,
    "one layer's weights zero": _one_layer(torch.zeros_like),
    "one layer's weights off by a thousandth of their size": _one_layer(_noisy(0.001)),
    "one layer's weights off by a twentieth of their size": _one_layer(_noisy(1 / 20)),
    "one layer's weights off by a tenth of their size": _one_layer(_noisy(0.1)),
    "one layer's weights off by their size": _one_layer(_noisy(1.0)),
    "two layers swapped": _swapped,
    "attention zero in every layer": _every("self_attn.o_proj", torch.zeros_like),
    "final norm neutral": _tensor(".model.norm.", torch.zeros_like),
    "final norm zero": _tensor(".model.norm.", lambda weight: -torch.ones_like(weight)),
    "rotary base of the sliding layers, recomputed unchanged": _rotary(0, 1e4),
    "rotary base of the sliding layers times ten": _rotary(0, 1e5),
    "rotary base of the global layer replaced by that of the others": _rotary(5, 1e4),
    "rotary tables zero": _tensor("cos_sin_cache", torch.zeros_like),
    "embeddings negated": _tensor("embed_tokens", torch.neg),
    "rows of a step in reverse order": _rows(lambda rows: rows[::-1]),
    "embedding rows shifted by one": _tensor("embed_tokens", lambda table: table.roll(1, 0)),
}
"""By name; the first, and one of the rotary ones, are controls that change nothing."""

SHAPES: dict[str, Callable[[Model], None]] = {
    "vectors of one number": _rows(lambda rows: [row[:1] / row[:1].abs() for row in rows]),
    "vectors of half the numbers": _rows(lambda rows: [row[: len(row) // 2] for row in rows]),
    "vectors in a vector": _rows(lambda rows: [row[None] for row in rows]),
}
"""By name; what has no vector's shape."""
