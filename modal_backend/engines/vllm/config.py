"""vLLM's arguments, and the check that the loaded model follows them.

vLLM resolves much by itself: files of a repository may decide the pooling, or an attribute may be
ignored silently. So everything that changes vectors is stated, and read from the loaded model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from kalm_integrations.errors import EngineLoadError
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import SCHEMES, Quantization, profile_of
from modal_backend.weights import Weights, memory_bytes

PROFILE: Final = 1
"""Version of how models are run; raised when that changes vectors."""

FP8_METHOD: Final = "fp8_per_tensor"
"""vLLM's name for `quantization="fp8"`: weights are converted while they are loaded."""

_POOLINGS: Final = {"LastPool": "last", "MeanPool": "mean", "CLSPool": "cls"}
_ATTENTION: Final = {"decoder": "causal", "encoder_only": "bidirectional"}
_DTYPES: Final = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}
_UNQUANTIZED: Final = "UnquantizedLinearMethod"
_GRAPH_SIZES: Final = (
    *(8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512),
    *(768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12_288, 16_384),
)
"""Tokens of the steps that are captured as CUDA graphs; a step is padded to the next size. A CPU
launches a step's kernels one by one in the time that a fast card computes 2,000 tokens in fp8.
vLLM's own 51 sizes end at 512."""
DTYPE_ARGUMENT: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

KERNELS: Final = {"enable_flashinfer_autotune": False}
"""Otherwise vLLM tunes FlashInfer's kernels at each load, on Hopper and newer cards."""

Dtype = Literal["auto", "bf16", "fp16", "fp32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMOptions:
    """How a model is run. "auto" and None are the choice of the model's profile, or vLLM's."""

    dtype: Dtype = "auto"  # of weights and arithmetic
    quantization: Quantization = "none"  # any other is another vector space
    max_model_len: int | None = None  # tokens of the longest text
    max_num_batched_tokens: int = 1024  # in one step, which a query may have to wait for
    max_num_seqs: int = 512  # most texts in one step
    enforce_eager: bool = False  # no compilation and no CUDA graphs: starts faster, runs slower
    gpu_memory_utilization: float | None = None
    """Share of the card for weights and KV cache. None sizes the KV cache by need, which keeps
    snapshots small."""


def engine_arguments(weights: Weights, options: VLLMOptions, *, can_sleep: bool) -> dict[str, Any]:
    """Return the arguments of `AsyncEngineArgs`; `can_sleep` is whether this platform has vLLM's
    sleep mode."""
    from vllm.config import PoolerConfig

    profile = profile_of(weights.name)
    space = profile.space
    dtype = profile.dtype if options.dtype == "auto" else options.dtype
    # Normalized, whatever the files of a repository say; for known models, the pooling too.
    pooler = PoolerConfig(use_activation=True)
    if space.declared:
        pooler = PoolerConfig(use_activation=True, seq_pooling_type=space.pooling.upper())
    step = options.max_num_batched_tokens
    arguments: dict[str, Any] = {
        "model": str(weights.folder),
        "served_model_name": weights.name,
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": pooler,
        "dtype": DTYPE_ARGUMENT[dtype] if dtype else "auto",
        "max_num_batched_tokens": step,
        "max_num_seqs": options.max_num_seqs,
        "scheduling_policy": "priority",
        "scheduler_cls": "modal_backend.engines.vllm.scheduler.QueryFirstScheduler",
        "async_scheduling": True,
        "enable_sleep_mode": can_sleep,
        "enable_prefix_caching": False,  # or bits would depend on what was embedded before
        "enforce_eager": options.enforce_eager,
        "cudagraph_capture_sizes": None if options.enforce_eager else graph_sizes(step),
        # Sliding-window layers would free blocks earlier, but six lists of blocks for each text
        # cost the CPUs more than that saves with texts as short as ours.
        "disable_hybrid_kv_cache_manager": True,
        "kernel_config": KERNELS,
        # By default vLLM reads through a memory map, page by page, which is slow on network
        # storage. Reading ahead needs memory for the files, or pages would be read twice.
        "safetensors_load_strategy": "prefetch" if weights.size <= 0.9 * memory_bytes() else None,
        "disable_log_stats": True,
        "trust_remote_code": False,
        "worker_extension_cls": "modal_backend.engines.vllm.extension.WorkerExtension",
    }
    length = options.max_model_len or (profile.max_tokens if space.declared else None)
    if length is not None:
        arguments["max_model_len"] = length
    if options.quantization == "fp8":
        arguments["quantization"] = FP8_METHOD
    if options.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
    return arguments


def graph_sizes(step: int) -> list[int]:
    """Return the sizes of CUDA graphs up to a full step of `step` tokens."""
    return [*(size for size in _GRAPH_SIZES if size < step), step]


def kv_cache_bytes(step: int, max_tokens: int, token_bytes: int) -> int:
    """Return the size of a KV cache for two full steps of `step` tokens, or for a longest text of
    `max_tokens`; a pooling model uses no more. `token_bytes` is the size of a token's entry."""
    # A text's last block of 16 tokens is not full.
    return int(1.25 * max(2 * step, max_tokens) * token_bytes) + 2**20


def kv_cache_bytes_of(model_config: Any, step: int) -> int:
    """`kv_cache_bytes` of the model in vLLM's `model_config`, for steps of `step` tokens."""
    heads = model_config.get_total_num_kv_heads() * model_config.get_head_size()
    numbers = 2 * model_config.get_total_num_hidden_layers() * heads
    return kv_cache_bytes(step, model_config.max_model_len, numbers * model_config.dtype.itemsize)


def identity_of(weights: Weights, inspected: Mapping[str, Any]) -> SpaceIdentity:
    """Return the space of the model loaded from `weights`, as `WorkerExtension.inspect_model`
    describes it."""
    schemes = " and ".join(name for name in inspected["linear"] if name != _UNQUANTIZED)
    dtypes = " and ".join(_DTYPES.get(name, name) for name in inspected["dtypes"])
    return SpaceIdentity(
        model=weights.name,
        revision=weights.revision,
        pooling=_POOLINGS.get(inspected["pooling"], inspected["pooling"])
        + (" and projection" if inspected["projector"] else ""),
        normalized=inspected["activation"] == "PoolerNormalize",
        attention=" and ".join(_ATTENTION.get(kind, kind) for kind in inspected["attention"]),
        quantization=schemes or dtypes,
        profile=PROFILE,
    )


def check(
    resolved: Any, identity: SpaceIdentity, options: VLLMOptions, arguments: Mapping[str, Any]
) -> None:
    """Compare the loaded model with the request, and raise an `EngineLoadError` that names all
    differences.

    Args:
        resolved: vLLM's own configuration after loading.
        identity: The space of the loaded model.
        options: The request.
        arguments: vLLM's arguments.
    """
    if differences := "; ".join(_differences(resolved, identity, options, arguments)):
        raise EngineLoadError(
            f"vLLM did not load {identity.model} as it was told to: {differences}."
        )


def _differences(
    resolved: Any, identity: SpaceIdentity, options: VLLMOptions, arguments: Mapping[str, Any]
) -> Iterator[str]:
    profile = profile_of(identity.model)
    if profile.space.declared:
        # Any revision may be chosen: clients notice. The quantization is part of the space too.
        scheme = SCHEMES.get(options.quantization, profile.space.quantization)
        expected = replace(profile.space, revision=identity.revision, quantization=scheme)
        if identity != expected:
            yield expected.differences(identity)
    if not identity.normalized:
        yield "normalized: True != False"
    dtype = identity.quantization
    if dtype not in _DTYPES.values():  # quantized: the type of the other weights
        dtype = _DTYPES.get(str(resolved.model_config.dtype), dtype)
    if options.dtype not in ("auto", dtype):
        yield f"dtype: {options.dtype!r} != {dtype!r}"
    wanted = options.quantization
    if wanted != "none" and not identity.quantization.startswith(f"{wanted} "):
        yield f"quantization: {wanted!r} != {identity.quantization!r}"
    model, scheduler = resolved.model_config, resolved.scheduler_config
    text = model.hf_text_config
    if getattr(text, "use_bidirectional_attention", None) and identity.attention == "causal":
        yield "attention: the model's config.json says bidirectional, what is loaded is causal"
    native = profile.dimensions[0] if profile.dimensions else model.embedding_size
    step = scheduler.max_num_batched_tokens
    pairs = {
        "runner": ("pooling", model.runner_type),
        "dimensions": (native, model.embedding_size),
        "max_model_len": (arguments.get("max_model_len", model.max_model_len), model.max_model_len),
        # vLLM may choose larger steps.
        "max_num_batched_tokens": (max(arguments["max_num_batched_tokens"], step), step),
        "scheduling": ("priority", scheduler.policy),
        "sleep mode": (arguments["enable_sleep_mode"], model.enable_sleep_mode),
    }
    for name, (requested, actual) in pairs.items():
        if requested != actual:
            yield f"{name}: {requested!r} != {actual!r}"


def dimensions_of(model_config: Any, name: str) -> tuple[int, ...]:
    """Return the native dimensions of model `name`, then those that it was trained to be cut to."""
    native = int(model_config.embedding_size)
    offered = profile_of(name).dimensions or tuple(model_config.matryoshka_dimensions or ())
    return (native, *sorted((n for n in offered if n < native), reverse=True))
