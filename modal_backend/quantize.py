"""Writes a model's weights in int8: half of bf16's bytes, in a checkpoint that vLLM loads as it is.

Each linear layer of the decoder becomes integers from -127 to 127 in groups of 128 inputs, with one
scale for each group, rounded to nearest; everything else stays as it is. Nothing is calibrated, so
the result depends on the weights alone. The format is "pack-quantized" of compressed-tensors.

The work is done in files of about 1 GiB. Each is written to the folder `partial`, read back and
compared with the original, moved, and recorded with its digest. So an interrupted run resumes, and
a finished one can be verified by running it again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

from kalm_integrations.errors import EngineLoadError
from modal_backend.weights import INT8, Weights, locate, quantized_folder

BITS: Final = 8
GROUP: Final = 128
_SHARD_BYTES: Final = 2**30
_LIBRARY: Final = "compressed-tensors"
_STATE: Final = "kalm-quantize.json"
_BYTES: Final = {"BF16": 2, "F16": 2}
_LAYER: Final = re.compile(r"(^|\.)layers\.\d+\.")
_LINEAR: Final = ".weight"
_OTHER_FORMATS: Final = frozenset({".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt"})
_REPLACED: Final = frozenset({"config.json", "model.safetensors.index.json"})


class Tensor(NamedTuple):
    """A tensor of the original weights."""

    file: Path
    name: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def layer(self) -> str | None:
        """Name of the linear layer of the decoder whose weight this is."""
        linear = _LAYER.search(self.name) and len(self.shape) == 2
        return self.name.removesuffix(_LINEAR) if linear else None


def quantize(model: str, revision: str | None = None) -> Weights:
    """Write the int8 weights of a model on this machine, resume that, or verify them.

    Args:
        model: A folder, or the name of a repository in the Hugging Face cache.
        revision: Of the repository; None is the pinned one, or "main".

    Raises:
        EngineLoadError: The model is missing, its weights have no int8 form here, or a written file
            differs from them.
    """
    from filelock import FileLock, Timeout

    source = locate(model, revision)
    folder = quantized_folder(source.name, source.revision)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f"{folder.name}.lock"), timeout=0):
            write(source, folder)
    except Timeout:
        raise EngineLoadError(f"another process writes {folder}; wait until it ends.") from None
    return locate(model, revision, INT8)


def write(source: Weights, folder: Path) -> None:
    """Write the int8 weights of `source` into `folder`; see `quantize`."""
    start = time.monotonic()
    config: dict[str, Any] = json.loads((source.folder / "config.json").read_text())
    shards = _plan(source.folder, config)
    print(f"Writing {source.name} at {source.revision} in int8 to {folder}", flush=True)  # noqa: T201
    partial = folder / "partial"  # safetensors, too, leaves files when it is killed
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    digests = _finished(folder, source)
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        path = folder / name
        done = name in digests and path.is_file() and _digest(path) == digests[name]
        if not done:
            _write_shard(partial / name, tensors)
            verify(partial / name, tensors)
            digests[name] = _digest(partial / name)
            (partial / name).replace(path)
            _save_json(folder / _STATE, {**_origin(source), "files": digests})
        seconds = time.monotonic() - start
        result = "verified" if done else "written and verified"
        print(f"{number} of {len(shards)} files {result}, {seconds:.0f} s", flush=True)  # noqa: T201
    shutil.rmtree(partial)
    _copy_others(source.folder, folder)
    _save_json(folder / "model.safetensors.index.json", _index(folder, list(digests)))
    # Last: without it, the folder is not a model.
    _save_json(folder / "config.json", config | {"quantization_config": quantization_config()})


def quantization_config(bits: int = BITS, group: int = GROUP) -> dict[str, Any]:
    """Return the entry of config.json that describes the format to vLLM and transformers."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    config = QuantizationConfig(
        config_groups={"group_0": _scheme(bits, group)},
        format="pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["lm_head"],
    )
    return {**config.model_dump(mode="json", exclude_none=True), "version": version(_LIBRARY)}


def _scheme(bits: int, group: int) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=group)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def _plan(folder: Path, config: dict[str, Any]) -> list[list[Tensor]]:
    """The tensors of each file to write. The same for the same weights."""
    if "quantization_config" in config:
        raise EngineLoadError(f"{folder} is quantized already; pass the original model.")
    shards: list[list[Tensor]] = []
    room, layers = 0, 0
    for tensor in _tensors(folder):
        size = tensor.bytes
        if tensor.layer is not None:
            _check_layer(tensor)
            layers, size = layers + 1, size * BITS // 16
        if size > room:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(tensor)
        room -= size
    if not layers:
        raise EngineLoadError(f"{folder} has no linear layers of a decoder in *.safetensors.")
    return shards


def _tensors(folder: Path) -> Iterator[Tensor]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                part = opened.get_slice(name)
                shape = tuple(part.get_shape())
                size = math.prod(shape) * _BYTES.get(part.get_dtype(), 4)
                yield Tensor(file, name, shape, size)


def _check_layer(tensor: Tensor) -> None:
    if not tensor.name.endswith(f"_proj{_LINEAR}"):
        raise EngineLoadError(
            f"{tensor.name} is not a layer of a kind that is known here: only decoders like "
            "Gemma 3 and Qwen 2 are supported."
        )
    if tensor.shape[1] % GROUP:
        raise EngineLoadError(
            f"{tensor.name} has {tensor.shape[1]} inputs, which groups of {GROUP} do not divide."
        )


def _write_shard(path: Path, tensors: Sequence[Tensor]) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from safetensors.torch import save_file

    scheme, made = _scheme(BITS, GROUP), {}
    for tensor, weight in _read(tensors):
        if tensor.layer is None:
            made[tensor.name] = weight.clone()  # the map of the file is closed before writing
            continue
        scale = _scales(tensor, weight)
        # In float32: a quotient in bf16 would be rounded twice.
        parts = {"weight": weight.float(), "weight_scale": scale.float()}
        packed = PackedQuantizationCompressor.compress(parts, scheme) | {"weight_scale": scale}
        made |= {f"{tensor.layer}.{name}": part for name, part in packed.items()}
    save_file(made, path, {"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _read(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Any]]:
    """Each tensor with its values, mapped into memory."""
    from safetensors import safe_open

    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for tensor in tensors:
            if tensor.file not in opened:
                file = safe_open(tensor.file, framework="pt")
                opened[tensor.file] = stack.enter_context(file)
            yield tensor, opened[tensor.file].get_tensor(tensor.name)


def _scales(tensor: Tensor, weight: Any) -> Any:
    """The scale of each group in bf16: with it, no weight is more than half a step off."""
    import torch

    largest = weight.unflatten(-1, (-1, GROUP)).abs().amax(-1).float()
    if not torch.isfinite(largest).all():
        raise EngineLoadError(f"{tensor.file}: {tensor.name} has values that are not finite.")
    # The smallest integer, -128, is not used.
    scale = (largest / (2 ** (BITS - 1) - 1)).to(torch.bfloat16)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def verify(path: Path, tensors: Sequence[Tensor]) -> None:
    """Compare a written file with the original weights.

    Raises:
        EngineLoadError: A weight is off by more than half a step of its group, or another tensor
            differs at all.
    """
    import torch
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from safetensors import safe_open

    scheme = _scheme(BITS, GROUP)
    with safe_open(path, framework="pt") as written:
        for tensor, weight in _read(tensors):
            if tensor.layer is None:
                good = torch.equal(written.get_tensor(tensor.name), weight)
            else:
                names = PackedQuantizationCompressor.compression_param_names(scheme)
                parts = {n: written.get_tensor(f"{tensor.layer}.{n}") for n in names}
                scale = parts["weight_scale"].float()
                good = torch.equal(parts["weight_scale"], _scales(tensor, weight))
                parts["weight_scale"] = scale
                back = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
                error = back.sub_(weight).abs_().unflatten(-1, (-1, GROUP)).amax(-1)
                good = good and bool((error <= scale * 0.50001).all())  # of float32's rounding
            if not good:
                raise EngineLoadError(
                    f"{path}: {tensor.name} read back differs from the original by more than "
                    "rounding. Check the disk and the memory of this machine, and run it again."
                )


def _finished(folder: Path, source: Weights) -> dict[str, str]:
    """Digests of the files that an earlier run has finished."""
    try:
        state = json.loads((folder / _STATE).read_text())
    except (OSError, ValueError):
        return {}
    files = state.pop("files", {})
    return dict(files) if state == _origin(source) else {}


def _origin(source: Weights) -> dict[str, str]:
    scheme = f"int{BITS}, groups of {GROUP}"
    made_by = f"{_LIBRARY} {version(_LIBRARY)}"
    return {"model": source.name, "revision": source.revision, "scheme": scheme, "by": made_by}


def _copy_others(source: Path, folder: Path) -> None:
    """Copy tokenizer, pooling, license: all but the weights and what describes them."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        weights = path.suffix in _OTHER_FORMATS or (
            path.parent == source and path.suffix == ".safetensors"
        )
        if path.is_file() and not hidden and not weights and str(name) not in _REPLACED:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def _index(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    from safetensors import safe_open

    places: dict[str, str] = {}
    size = sum((folder / name).stat().st_size for name in names)
    for name in sorted(names):
        with safe_open(folder / name, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), name)
    return {"metadata": {"total_size": size}, "weight_map": places}


def _save_json(path: Path, content: Any) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True))
    partial.replace(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
