"""The GPUs that Modal offers: memory, price and throughput with KaLM.

This table is the only source for `kalm deploy`, `kalm cost`, `kalm embed --dry-run` and the docs.
`MEASURED` holds every measured throughput; the others are calculated from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, get_args

from kalm_integrations.environment import did_you_mean
from kalm_integrations.models import KALM, Quantization
from modal_backend.engines.vllm.config import VLLMOptions, kv_cache_bytes

QUANTIZATIONS: Final[tuple[Quantization, ...]] = get_args(Quantization)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU type: nominal GiB of memory, TFLOP/s without sparsity in bf16 and in fp8 (None: no fp8
    hardware), and Modal's price in $ per second, without a region."""

    gib: int
    bf16: float
    fp8: float | None
    dollars: float


GPUS: Final = {
    "L4": Gpu(24, 121, 242, 0.000222),
    "A10": Gpu(24, 125, None, 0.000306),
    "L40S": Gpu(48, 362, 733, 0.000542),
    "A100-40GB": Gpu(40, 312, None, 0.000583),
    "A100-80GB": Gpu(80, 312, None, 0.000694),
    "H100": Gpu(80, 989, 1979, 0.001097),
    "H200": Gpu(141, 989, 1979, 0.001261),
    "B200": Gpu(180, 2250, 4500, 0.001736),
}
"""NVIDIA's data sheets (H100, H200, A100: SXM; B200: HGX) and `PRICES`."""

PRICES: Final = "modal.com/pricing in November 2026, without a region"
_CORE_DOLLARS, _GIB_DOLLARS = 0.0000131, 0.00000222  # per second

CORES: Final = 4.0
"""Cores of a container: the engine's core process, the tokenizer, the endpoints."""

HOST_GIB: Final = {"none": 40, "fp8": 28, "int8": 28}
"""Host memory of a container. A sleeping engine takes 26.6 and 16.7 GiB in bf16 and fp8 (measured);
loading takes more for a while."""

FIRST_START: Final = 460.0
SNAPSHOT_START: Final = 70.0
STARTS: Final = "what others measured on Modal for a 27 B model in fp8 on an A100-80GB"
"""Source of the seconds of a start that loads the model, and of one that restores a snapshot."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Throughput of one container that is never idle.

    Attributes:
        tokens: Tokens per second through the whole service, for texts of 128 tokens.
        measured: Whether it was measured on this GPU; otherwise it is calculated.
        source: Machine, date and script of the measurement, or the calculation.
    """

    tokens: float
    measured: bool
    source: str


_H100: Final = "one H100 80GB, random weights, 24 November 2026, benchmarks/gpu/performance.py"
_H200: Final = "one H200, random weights, 28 November 2026, benchmarks/gpu/performance.py"
_H100_INT8: Final = "one H100 80GB, random weights, 28 November 2026, benchmarks/gpu/NOTES.md"
_H200_INT8: Final = _H200.replace("28 November", "29 November")
MEASURED: Final[dict[tuple[str, Quantization], Rate]] = {
    ("H100", "none"): Rate(28_000, measured=True, source=_H100),
    ("H100", "fp8"): Rate(41_400, measured=True, source=_H100),
    ("H100", "int8"): Rate(24_400, measured=True, source=_H100_INT8),
    ("H200", "none"): Rate(28_600, measured=True, source=_H200),
    ("H200", "fp8"): Rate(42_100, measured=True, source=_H200),
    ("H200", "int8"): Rate(24_500, measured=True, source=_H200_INT8),
}
"""All measurements; a newer one replaces its predecessor."""

REFERENCE: Final = "H100"
CALCULATED: Final = f"the {REFERENCE}'s, times the ratio of the data sheets' dense TFLOP/s"
"""How the throughput of the other GPUs is calculated."""

_TOKEN_BYTES: Final = 2 * 48 * 8 * 256 * 2  # keys and values of a token: 48 layers, 8 heads, bf16
_WEIGHTS_GIB: Final = {"none": 22, "fp8": 13, "int8": 13}
_WORKING_GIB: Final = 3  # activations, CUDA graphs, CUDA itself
_USABLE: Final = 0.95  # of the nominal memory


def rate(gpu: str, quantization: Quantization) -> Rate:
    """Throughput: measured if possible, otherwise the reference's times the ratio of the peaks."""
    if known := MEASURED.get((gpu, quantization)):
        return known
    reference = MEASURED[REFERENCE, quantization].tokens
    ratio = _peak(GPUS[gpu], quantization) / _peak(GPUS[REFERENCE], quantization)
    return Rate(round(reference * ratio, -2), measured=False, source=CALCULATED)


def _peak(gpu: Gpu, quantization: Quantization) -> float:
    return gpu.fp8 if quantization == "fp8" and gpu.fp8 else gpu.bf16


def gpu_named(name: str) -> Gpu:
    """Look up a GPU; "!", with which Modal pins a type, may follow its name.

    Raises:
        ValueError: There is none of this name.
    """
    name = name.removesuffix("!")
    known = GPUS.get(name)
    if known is None:
        longer = [f" Did you mean {gpu}?" for gpu in GPUS if gpu.startswith(name.upper())]
        hint = (longer or [did_you_mean(name.upper(), GPUS)])[0]
        raise ValueError(f"gpu={name!r}: there is no such GPU.{hint} There are {', '.join(GPUS)}")
    return known


def kv_gib(longest: int | None = None) -> float:
    """GiB of KV cache: two steps, or the longest text (in tokens, None: the default) if longer."""
    step = VLLMOptions().max_num_batched_tokens
    return kv_cache_bytes(step, longest or KALM.max_tokens, _TOKEN_BYTES) / 2**30


def needed_gib(quantization: Quantization, longest: int | None = None) -> float:
    """Nominal GiB that a GPU must have for KaLM."""
    return (_WEIGHTS_GIB[quantization] + kv_gib(longest) + _WORKING_GIB) / _USABLE


def too_small(gpu: str, quantization: Quantization, longest: int | None = None) -> str:
    """Why KaLM does not fit this GPU; empty if it does."""
    has, needed = gpu_named(gpu).gib, needed_gib(quantization, longest)
    if has >= needed:
        return ""
    return f"has {has} GiB; weights, KV cache and working memory take {needed:.0f}"


def lacks_fp8(gpu: str, quantization: Quantization) -> str:
    """Why this GPU computes other vectors than those of fp8; empty if it does not."""
    if quantization != "fp8" or gpu_named(gpu).fp8:
        return ""
    return "does not compute in fp8 and would give other vectors"


def problem(gpu: str, quantization: Quantization) -> str:
    """Why KaLM does not run on this GPU; empty if it does."""
    return lacks_fp8(gpu, quantization) or too_small(gpu, quantization)


def machine_dollars(cores: float, gib: float) -> float:
    """$ per second of a container without its GPU. Modal bills what is requested."""
    return cores * _CORE_DOLLARS + gib * _GIB_DOLLARS


def container_dollars(gpus: Iterable[str], quantization: Quantization) -> float:
    """$ per second of a container as we deploy it, with the most expensive of `gpus`."""
    gpu = max((gpu_named(name).dollars for name in gpus), default=0.0)
    return machine_dollars(CORES, HOST_GIB[quantization]) + gpu
