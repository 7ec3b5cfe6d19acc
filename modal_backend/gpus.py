"""Memory, speed and price of each GPU with KaLM, for `kalm deploy` and `kalm cost`.

`MEASURED` has all measurements with their sources. The rest is calculated from them and from
NVIDIA's data sheets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from kalm_integrations.environment import did_you_mean
from kalm_integrations.models import KALM
from modal_backend.engines.vllm.config import VLLMOptions, kv_cache_bytes

Quantization = Literal["none", "fp8"]
QUANTIZATIONS: Final[tuple[Quantization, ...]] = ("none", "fp8")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card."""

    gib: int  # nominal memory
    bf16: float  # dense TFLOP/s; data sheets show twice that "with sparsity"
    fp8: float | None  # the same in fp8; None if it is not supported
    bandwidth: float  # GB/s of its memory
    dollars: float  # for a second on Modal, without a region

    def peak(self, quantization: Quantization) -> float:
        """FLOP/s by the data sheet, in bf16 if the card does not support fp8."""
        return 1e12 * (self.fp8 if quantization == "fp8" and self.fp8 else self.bf16)


GPUS: Final = {
    "L4": Gpu(24, 121, 242, 300, 0.000222),
    "A10": Gpu(24, 125, None, 600, 0.000306),
    "L40S": Gpu(48, 362, 733, 864, 0.000542),
    "A100-40GB": Gpu(40, 312, None, 1555, 0.000583),
    "A100-80GB": Gpu(80, 312, None, 2039, 0.000694),
    "H100": Gpu(80, 989, 1979, 3350, 0.001097),
    "H200": Gpu(141, 989, 1979, 4800, 0.001261),
    "B200": Gpu(180, 2250, 4500, 7700, 0.001736),
}
"""NVIDIA's data sheets (H100, H200, A100: SXM; B200: HGX); prices of modal.com/pricing, 11/2026."""

_CPU_DOLLARS, _GIB_DOLLARS = 0.0000131, 0.00000222  # a core and a GiB of memory, each second

CORES: Final = 4.0
"""Cores of a container: for the engine's core process, the tokenizer and the endpoints."""

HOST_GIB: Final = {"none": 40, "fp8": 28}
"""Host memory of a container. A sleeping engine takes 26.6 and 16.7 GiB, loading takes more."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Throughput of the whole service under full load."""

    gpu: str
    quantization: Quantization
    tokens_per_second: float
    tokens_per_text: int
    source: str  # machine, date and script


_ON_H100: Final = "one H100 80GB, random weights, 24 November 2026, benchmarks/gpu/performance.py"
_ON_H200: Final = "one H200, random weights, 28 November 2026, benchmarks/gpu/performance.py"
MEASURED: Final = (
    Measurement("H100", "none", 28_000, 128, _ON_H100),
    Measurement("H100", "fp8", 41_400, 128, _ON_H100),
    Measurement("H200", "none", 28_600, 128, _ON_H200),
    Measurement("H200", "fp8", 42_100, 128, _ON_H200),
)
"""A newer measurement replaces its predecessor."""

REFERENCE: Final = "H100"
"""The card from whose measurements the other rates are calculated."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Throughput of one container under full load."""

    tokens: float  # a second
    measured: bool  # on this card; else it is calculated
    source: str


_PARAMETERS: Final = 10_759_155_456  # without the embedding table, which is only looked up
_LAYERS, _HEADS = 48, 16 * 256  # of KaLM
_TOKEN_BYTES: Final = 2 * _LAYERS * 8 * 256 * 2  # keys and values of a token, in bf16
_WEIGHTS_GIB: Final = {"none": 22, "fp8": 13}
_WEIGHT_BYTES: Final = {"none": 2, "fp8": 1}
_WORKING_GIB: Final = 3  # activations, CUDA graphs, CUDA itself
_USABLE: Final = 0.95  # of the nominal memory


def flop_per_token(tokens_per_text: int) -> float:
    """FLOP for each token of texts within the model's sliding window of 1,024 tokens.

    2 for each parameter; and in each layer 4 for each number of a head and each attended token,
    which is half of the text on average.
    """
    return 2 * _PARAMETERS + 4 * _LAYERS * _HEADS * (tokens_per_text + 1) / 2


def share_of_peak(measurement: Measurement) -> float:
    """The share of the data sheet's FLOP/s that a measurement reached."""
    flops = measurement.tokens_per_second * flop_per_token(measurement.tokens_per_text)
    return flops / GPUS[measurement.gpu].peak(measurement.quantization)


def rate(gpu: str, quantization: Quantization) -> Rate:
    """The measured rate of a card, or else a calculated one.

    The latter assumes the reference card's share of its data sheet's peak in the same type:
    tokens/s = share * peak of this card / FLOP for each token.
    """
    for measurement in MEASURED:
        if (measurement.gpu, measurement.quantization) == (gpu, quantization):
            return Rate(measurement.tokens_per_second, measured=True, source=measurement.source)
    reference = measured_reference(quantization)
    share = share_of_peak(reference)
    flops = share * GPUS[gpu].peak(quantization)
    source = f"data sheet, at the {REFERENCE}'s share of its peak, {share:.0%}"
    return Rate(flops / flop_per_token(reference.tokens_per_text), measured=False, source=source)


def measured_reference(quantization: Quantization) -> Measurement:
    """The reference card's measurement in this type."""
    return next(m for m in MEASURED if (m.gpu, m.quantization) == (REFERENCE, quantization))


def query_seconds(gpu: str, quantization: Quantization) -> float:
    """The least time of a query, in which all weights are read once. Calculated."""
    return _PARAMETERS * _WEIGHT_BYTES[quantization] / (1e9 * GPUS[gpu].bandwidth)


def gpu_named(name: str) -> Gpu:
    """Return the card with this name, to which Modal's "!" (pinned type) may be appended.

    Raises:
        ValueError: There is no such card.
    """
    name = name.removesuffix("!")
    if name in GPUS:
        return GPUS[name]
    longer = [f" Did you mean {gpu}?" for gpu in GPUS if gpu.startswith(name.upper())]
    hint = (longer or [did_you_mean(name.upper(), GPUS)])[0]
    raise ValueError(f"gpu={name!r}: there is no such GPU.{hint} There are {', '.join(GPUS)}")


def step_tokens() -> int:
    """Most tokens in a step of the deployed engine."""
    return VLLMOptions().max_num_batched_tokens


def kv_gib(max_tokens: int | None = None) -> float:
    """GiB of the KV cache, for a longest text of `max_tokens` tokens or KaLM's default."""
    return kv_cache_bytes(step_tokens(), max_tokens or KALM.max_tokens, _TOKEN_BYTES) / 2**30


def needed_gib(quantization: Quantization, max_tokens: int | None = None) -> float:
    """Nominal GiB that a card needs for KaLM; `max_tokens` as in `kv_gib`."""
    return (_WEIGHTS_GIB[quantization] + kv_gib(max_tokens) + _WORKING_GIB) / _USABLE


def too_small(gpu: str, quantization: Quantization, max_tokens: int | None = None) -> str:
    """Why KaLM is too large for this card, or an empty string."""
    has, needed = gpu_named(gpu).gib, needed_gib(quantization, max_tokens)
    if has >= needed:
        return ""
    return f"has {has} GiB; weights, KV cache and working memory take {needed:.0f}"


def lacks_fp8(gpu: str, quantization: Quantization) -> str:
    """Why this card cannot compute in the requested type, or an empty string."""
    if quantization == "none" or gpu_named(gpu).fp8:
        return ""
    return "does not compute in fp8 and would give other vectors"


def problem(gpu: str, quantization: Quantization) -> str:
    """Why KaLM does not run on this card, or an empty string."""
    return lacks_fp8(gpu, quantization) or too_small(gpu, quantization)


def machine_dollars(cores: float, gib: float) -> float:
    """$ a second of a container without a GPU. Modal bills what is requested, used or not."""
    return cores * _CPU_DOLLARS + gib * _GIB_DOLLARS


def container_dollars(gpus: Iterable[str], quantization: Quantization) -> float:
    """$ a second of a deployed container with the most expensive of `gpus`."""
    gpu = max((gpu_named(name).dollars for name in gpus), default=0.0)
    return machine_dollars(CORES, HOST_GIB[quantization]) + gpu


@dataclass(frozen=True, slots=True)
class ColdStart:
    """The duration of a start from a snapshot of a sleeping engine."""

    container: float  # seconds until a container runs, according to Modal
    wake: float  # seconds of restore, wake and canary, measured on an H100 (docs/performance.md)
    gib: float  # size of the snapshot: the host memory measured there

    def seconds(self, gb_per_second: float) -> float:
        """Total if the snapshot is read at this rate. Calculated."""
        return self.container + self.wake + self.gib * 2**30 / 1e9 / gb_per_second


COLD_STARTS: Final = {"none": ColdStart(1.0, 2.1, 26.6), "fp8": ColdStart(1.0, 1.2, 16.7)}
READING: Final = (1.0, 2.5)
"""GB/s from Modal's storage, according to Modal; not measured with KaLM's snapshots."""

FIRST_START: Final = 460.0
"""Seconds of a start without a snapshot: measured by others on Modal, for a model of 27 B
parameters in fp8 on an A100. KaLM has never run there."""


def cold_start(quantization: Quantization) -> float:
    """Seconds of a cold start, in the middle of `READING`."""
    return COLD_STARTS[quantization].seconds(sum(READING) / 2)
