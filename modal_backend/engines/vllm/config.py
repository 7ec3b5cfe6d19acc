"""What vLLM is asked for, and whether that is what it made of it.

vLLM resolves much on its own: a repository's files may decide on pooling, a card may not compute
in the type that was asked for, an attribute may be ignored without a word. So everything that
moves a vector is stated, and read again off the loaded model; the identity is what was read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from kalm_integrations.errors import EngineLoadError
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import FP8, ModelProfile, profile_of
from modal_backend.weights import Weights, memory_bytes

PROFILE: Final = 1
"""Version of our way of running models; raised when vectors change with it."""

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
"""Tokens of the steps that are kept as CUDA graphs, up to a full one; another is padded to the
next. To launch a step's kernels one by one takes a CPU as long as a fast card takes to compute
2,000 tokens in fp8. vLLM's own sizes end at 512, and are 51."""
DTYPE_ARGUMENT: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

KERNELS: Final = {"enable_flashinfer_autotune": False}
"""Otherwise vLLM tunes FlashInfer's kernels at each load, on Hopper and newer cards."""

Dtype = Literal["auto", "bf16", "fp16", "fp32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMOptions:
    """How a model is run.

    Attributes:
        dtype: Of weights and arithmetic; "auto" is the model's profile's, else vLLM's choice.
        quantization: "fp8" is done while loading, from the same weights; another space.
        max_model_len: Longest text in tokens; None is the profile's, else what the model allows.
        max_num_batched_tokens: Tokens in one step: what a query may have to wait for.
        max_num_seqs: Most texts in one step.
        enforce_eager: Neither compile nor capture CUDA graphs: starts faster, runs slower.
        gpu_memory_utilization: Share of the card that weights and KV cache may fill; None sizes
            the KV cache by need, which keeps snapshots small.
        prefix_caching: Keep the states of texts' beginnings. Off: a text's bits do not depend on
            what was embedded before it.
    """

    dtype: Dtype = "auto"
    quantization: Literal["none", "fp8"] = "none"
    max_model_len: int | None = None
    max_num_batched_tokens: int = 1024
    max_num_seqs: int = 512
    enforce_eager: bool = False
    gpu_memory_utilization: float | None = None
    prefix_caching: bool = False


def arguments(weights: Weights, options: VLLMOptions, *, can_sleep: bool) -> dict[str, Any]:
    """The arguments of `AsyncEngineArgs`.

    Args:
        weights: The model.
        options: How it is run.
        can_sleep: Whether this platform has vLLM's sleep mode.
    """
    from vllm.config import PoolerConfig

    profile = profile_of(weights.name)
    space = profile.space
    dtype = profile.dtype if options.dtype == "auto" else options.dtype
    # Normalized, whatever a repository's files say; pooling too where we know the model.
    pooler = PoolerConfig(use_activation=True)
    if space.declared:
        pooler = PoolerConfig(use_activation=True, seq_pooling_type=space.pooling.upper())
    step = options.max_num_batched_tokens
    asked: dict[str, Any] = {
        "model": str(weights.folder),
        "served_model_name": weights.name,
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": pooler,
        "dtype": DTYPE_ARGUMENT[dtype] if dtype else "auto",
        "max_num_batched_tokens": step,
        "max_num_seqs": options.max_num_seqs,
        "scheduling_policy": "priority",
        "scheduler_cls": "modal_backend.engines.vllm.scheduler.QueriesFirst",
        "async_scheduling": True,
        "enable_sleep_mode": can_sleep,
        "enable_prefix_caching": options.prefix_caching,
        "enforce_eager": options.enforce_eager,
        "cudagraph_capture_sizes": None if options.enforce_eager else graph_sizes(step),
        # Layers of a sliding window would free their blocks earlier; six lists of blocks for each
        # text cost the CPUs more than that saves of texts that are as short as ours.
        "disable_hybrid_kv_cache_manager": True,
        "kernel_config": KERNELS,
        "safetensors_load_strategy": load_strategy(weights),
        "disable_log_stats": True,
        "trust_remote_code": False,
        "worker_extension_cls": "modal_backend.engines.vllm.extension.Extension",
    }
    length = options.max_model_len or (profile.max_tokens if space.declared else None)
    if length is not None:
        asked["max_model_len"] = length
    if options.quantization == "fp8":
        asked["quantization"] = FP8_METHOD
    if options.gpu_memory_utilization is not None:
        asked["gpu_memory_utilization"] = options.gpu_memory_utilization
    return asked


def load_strategy(weights: Weights) -> Literal["prefetch"] | None:
    """How vLLM reads the weights: whole files ahead of their use where they fit into memory.

    By default it reads through a memory map, page by page, which is slow from a network's storage
    that it does not recognize as such. Where memory is too small, pages would be read twice.
    """
    return "prefetch" if weights.size <= 0.9 * memory_bytes() else None


def graph_sizes(step: int) -> list[int]:
    """Sizes of the steps that are kept as CUDA graphs.

    Args:
        step: Most tokens in a step, which is one of them.
    """
    return [*(size for size in _GRAPH_SIZES if size < step), step]


def kv_room(step: int, longest: int, token: int) -> int:
    """Bytes for two full steps, or for the longest text: more is of no use to a pooling model.

    Args:
        step: Most tokens in a step.
        longest: Tokens of the longest text.
        token: Bytes of one token's keys and values.
    """
    # A text's last block of 16 tokens is not full.
    return int(1.25 * max(2 * step, longest) * token) + 2**20


def kv_cache_bytes(model_config: Any, step: int) -> int:
    """`kv_room` of a model.

    Args:
        model_config: vLLM's, of the arguments.
        step: Most tokens in a step.
    """
    heads = model_config.get_total_num_kv_heads() * model_config.get_head_size()
    numbers = 2 * model_config.get_total_num_hidden_layers() * heads
    return kv_room(step, model_config.max_model_len, numbers * model_config.dtype.itemsize)


def identity_of(weights: Weights, inspected: Mapping[str, Any]) -> SpaceIdentity:
    """The space of a loaded model.

    Args:
        weights: What was loaded.
        inspected: What `Extension.inspect_model` found.
    """
    return SpaceIdentity(
        model=weights.name,
        revision=weights.revision,
        pooling=_POOLINGS.get(inspected["pooling"], inspected["pooling"])
        + (" and projection" if inspected["projector"] else ""),
        normalized=inspected["activation"] == "PoolerNormalize",
        attention=" and ".join(_ATTENTION.get(kind, kind) for kind in inspected["attention"]),
        quantization=_quantization(inspected),
        profile=PROFILE,
    )


def _quantization(inspected: Mapping[str, Any]) -> str:
    scheme = " and ".join(name for name in inspected["linear"] if name != _UNQUANTIZED)
    dtypes = " and ".join(_DTYPES.get(name, name) for name in inspected["dtypes"])
    return scheme or dtypes


def check(
    resolved: Any, identity: SpaceIdentity, options: VLLMOptions, asked: Mapping[str, Any]
) -> None:
    """Compare what was loaded with what was asked for.

    Args:
        resolved: vLLM's own configuration, after loading.
        identity: Of the loaded model.
        options: How it was to be run.
        asked: The arguments that vLLM was given.

    Raises:
        EngineLoadError: They differ; the message names each difference.
    """
    wrong = list(_differences(resolved, identity, options, asked))
    if wrong:
        raise EngineLoadError(
            f"vLLM did not load {identity.model} as it was told to: {'; '.join(wrong)}."
        )


def _differences(
    resolved: Any, identity: SpaceIdentity, options: VLLMOptions, asked: Mapping[str, Any]
) -> Iterator[str]:
    profile = profile_of(identity.model)
    if profile.space.declared:
        # A revision may be chosen: clients will notice. fp8 is another space of the same model.
        ours = {"revision": identity.revision}
        if options.quantization == "fp8":
            ours["quantization"] = FP8
        expected = type(identity)(**(profile.space.to_dict() | ours))
        if identity != expected:
            yield expected.differences(identity)
    if not identity.normalized:
        yield "normalized: True != False"
    loaded = identity.quantization
    if loaded not in _DTYPES.values():  # quantized: what the other weights are in
        loaded = _DTYPES.get(str(resolved.model_config.dtype), loaded)
    if options.dtype not in ("auto", loaded):
        yield f"dtype: {options.dtype!r} != {loaded!r}"
    if options.quantization == "fp8" and not identity.quantization.startswith("fp8 "):
        yield f"quantization: 'fp8' != {identity.quantization!r}"
    model, scheduler = resolved.model_config, resolved.scheduler_config
    text = model.hf_text_config
    if getattr(text, "use_bidirectional_attention", None) and identity.attention == "causal":
        yield "attention: the model's config.json says bidirectional, what is loaded is causal"
    pairs = {
        "runner": ("pooling", model.runner_type),
        "dimensions": (_native(profile) or model.embedding_size, model.embedding_size),
        "max_model_len": (asked.get("max_model_len", model.max_model_len), model.max_model_len),
        "max_num_batched_tokens": (  # vLLM may take more
            max(asked["max_num_batched_tokens"], scheduler.max_num_batched_tokens),
            scheduler.max_num_batched_tokens,
        ),
        "scheduling": ("priority", scheduler.policy),
        "sleep mode": (asked["enable_sleep_mode"], model.enable_sleep_mode),
    }
    for name, (wanted, got) in pairs.items():
        if wanted != got:
            yield f"{name}: {wanted!r} != {got!r}"


def _native(profile: ModelProfile) -> int | None:
    return profile.dimensions[0] if profile.dimensions else None


def dimensions_of(model_config: Any, name: str) -> tuple[int, ...]:
    """Native dimensions, then those that the model was trained to be cut to."""
    known = profile_of(name).dimensions
    native = int(model_config.embedding_size)
    offered = known or tuple(model_config.matryoshka_dimensions or ())
    return (native, *sorted((n for n in offered if n < native), reverse=True))
