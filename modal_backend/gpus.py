"""What each GPU holds, does and costs with KaLM: the table of `kalm deploy` and `kalm cost`.

Measured and calculated are kept apart: `MEASURED` is all that was measured, with its source; the
rest follows from that and from NVIDIA's data sheets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from kalm_integrations.environment import did_you_mean
from kalm_integrations.models import KALM
from modal_backend.engines.vllm.config import VLLMOptions, kv_room

Quantization = Literal["none", "fp8"]
QUANTIZATIONS: Final[tuple[Quantization, ...]] = ("none", "fp8")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card.

    Attributes:
        gib: Memory, as printed on it.
        bf16: TFLOP/s in bf16, dense: data sheets show twice that "with sparsity".
        fp8: The same in fp8; None if it does not compute in it.
        bandwidth: GB/s of its memory.
        dollars: A second of it on Modal, without a region.
    """

    gib: int
    bf16: float
    fp8: float | None
    bandwidth: float
    dollars: float

    def peak(self, quantization: Quantization) -> float:
        """FLOP/s by the data sheet; of a card without fp8, those of bf16."""
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
"""What a container asks for: the engine's core process, the tokenizer, the doors."""

HOST_GIB: Final = {"none": 40, "fp8": 28}
"""Host memory: an engine asleep lies in it whole, 26.6 and 16.7 GiB measured; loading
it takes more for a while."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Tokens a second through the whole service, never idle, on a card.

    Attributes:
        gpu: One of `GPUS`.
        quantization: What it computed in.
        tokens_per_second: What came out.
        tokens_per_text: Length of the texts.
        source: Machine, date and script.
    """

    gpu: str
    quantization: Quantization
    tokens_per_second: float
    tokens_per_text: int
    source: str


_ON_H100: Final = "one H100 80GB, random weights, 24 November 2026, benchmarks/gpu/performance.py"
_ON_H200: Final = "one H200, random weights, 28 November 2026, benchmarks/gpu/performance.py"
MEASURED: Final = (
    Measurement(
        gpu="H100",
        quantization="none",
        tokens_per_second=28_000,
        tokens_per_text=128,
        source=_ON_H100,
    ),
    Measurement(
        gpu="H100",
        quantization="fp8",
        tokens_per_second=41_400,
        tokens_per_text=128,
        source=_ON_H100,
    ),
    Measurement(
        gpu="H200",
        quantization="none",
        tokens_per_second=28_600,
        tokens_per_text=128,
        source=_ON_H200,
    ),
    Measurement(
        gpu="H200",
        quantization="fp8",
        tokens_per_second=42_100,
        tokens_per_text=128,
        source=_ON_H200,
    ),
)
"""All of it: a figure that is not here is calculated. A newer one replaces its predecessor."""

REFERENCE: Final = "H100"
"""The card whose measurements the others are calculated from."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens a second of one container whose engine is never idle.

    Attributes:
        tokens: How many.
        measured: Whether that was measured on this card; else it is calculated.
        source: Where it is from.
    """

    tokens: float
    measured: bool
    source: str


_PARAMETERS: Final = 10_759_155_456  # that multiply: all but the embedding table
_LAYERS, _HEADS = 48, 16 * 256  # of KaLM
_TOKEN_BYTES: Final = 2 * _LAYERS * 8 * 256 * 2  # keys and values of a token, in bf16
_WEIGHTS_GIB: Final = {"none": 22, "fp8": 13}
_WEIGHT_BYTES: Final = {"none": 2, "fp8": 1}
_ROOM_GIB: Final = 3  # activations, CUDA graphs, CUDA itself
_USABLE: Final = 0.95  # of what is printed on a card


def flop_per_token(tokens_per_text: int) -> float:
    """FLOP for each token of texts within the model's sliding window of 1,024 tokens.

    2 for each parameter; and in each layer 4 for each number of a head and each token that is
    looked at, which is half of the text on average.
    """
    return 2 * _PARAMETERS + 4 * _LAYERS * _HEADS * (tokens_per_text + 1) / 2


def share_of_peak(measurement: Measurement) -> float:
    """How much of the data sheet's FLOP/s a measurement made use of."""
    flops = measurement.tokens_per_second * flop_per_token(measurement.tokens_per_text)
    return flops / GPUS[measurement.gpu].peak(measurement.quantization)


def rate(gpu: str, quantization: Quantization) -> Rate:
    """Tokens a second: measured, where they were; else calculated.

    Calculated is the reference card's share of its data sheet's peak, in the same type, times
    this card's peak: tokens/s = share * peak / FLOP for each token.
    """
    for made in MEASURED:
        if (made.gpu, made.quantization) == (gpu, quantization):
            return Rate(made.tokens_per_second, measured=True, source=made.source)
    known = measured_reference(quantization)
    flops = share_of_peak(known) * GPUS[gpu].peak(quantization)
    return Rate(
        flops / flop_per_token(known.tokens_per_text),
        measured=False,
        source=f"data sheet, at the {REFERENCE}'s share of its peak, {share_of_peak(known):.0%}",
    )


def measured_reference(quantization: Quantization) -> Measurement:
    """The reference card's measurement in this type."""
    return next(
        made for made in MEASURED if (made.gpu, made.quantization) == (REFERENCE, quantization)
    )


def query_seconds(gpu: str, quantization: Quantization) -> float:
    """What one query takes at least: all weights are read once. Calculated."""
    return _PARAMETERS * _WEIGHT_BYTES[quantization] / (1e9 * GPUS[gpu].bandwidth)


def gpu_named(name: str) -> Gpu:
    """The card of a name; "!", with which Modal pins a type, may follow it.

    Raises:
        ValueError: There is none.
    """
    name = name.removesuffix("!")
    known = GPUS.get(name)
    if known is None:
        longer = [f" Did you mean {gpu}?" for gpu in GPUS if gpu.startswith(name.upper())]
        hint = (longer or [did_you_mean(name.upper(), GPUS)])[0]
        raise ValueError(f"gpu={name!r}: there is no such GPU.{hint} There are {', '.join(GPUS)}")
    return known


def step_tokens() -> int:
    """Most tokens in a step of the engine, as it is deployed."""
    return VLLMOptions().max_num_batched_tokens


def kv_gib(longest: int | None = None) -> float:
    """GiB of KV cache: of two steps, or of the longest text if that is more.

    Args:
        longest: Its tokens; None is KaLM's default.
    """
    return kv_room(step_tokens(), longest or KALM.max_tokens, _TOKEN_BYTES) / 2**30


def needed_gib(quantization: Quantization, longest: int | None = None) -> float:
    """GiB that a card must have for KaLM, as printed on it.

    Args:
        quantization: Of the weights.
        longest: Tokens of the longest text; None is KaLM's default.
    """
    return (_WEIGHTS_GIB[quantization] + kv_gib(longest) + _ROOM_GIB) / _USABLE


def too_small(gpu: str, quantization: Quantization, longest: int | None = None) -> str:
    """Why KaLM is too large for this card; empty if it is not."""
    has, needed = gpu_named(gpu).gib, needed_gib(quantization, longest)
    if has >= needed:
        return ""
    return f"has {has} GiB; weights, KV cache and working memory take {needed:.0f}"


def lacks_fp8(gpu: str, quantization: Quantization) -> str:
    """Why this card gives no vectors of the space that is asked for; empty if it does."""
    if quantization == "none" or gpu_named(gpu).fp8:
        return ""
    return "does not compute in fp8 and would give other vectors"


def problem(gpu: str, quantization: Quantization) -> str:
    """Why KaLM does not run on this card; empty if it does."""
    return lacks_fp8(gpu, quantization) or too_small(gpu, quantization)


def machine_dollars(cores: float, gib: float) -> float:
    """$ a second of a container, less its GPU. Modal bills what is asked for, used or not."""
    return cores * _CPU_DOLLARS + gib * _GIB_DOLLARS


def container_dollars(gpus: Iterable[str], quantization: Quantization) -> float:
    """$ a second of a container as we deploy it, at the dearest of `gpus`."""
    dearest = max((gpu_named(name).dollars for name in gpus), default=0.0)
    return machine_dollars(CORES, HOST_GIB[quantization]) + dearest


@dataclass(frozen=True, slots=True)
class ColdStart:
    """The budget of a start from a snapshot of an engine asleep.

    Attributes:
        container: Seconds until a container runs: Modal's own figure, not ours.
        wake: Seconds of restore, wake and canary: measured on an H100, docs/performance.md.
        gib: The snapshot: host memory that was measured there.
    """

    container: float
    wake: float
    gib: float

    def seconds(self, gb_per_second: float) -> float:
        """All of it, where the snapshot is read at this rate. Calculated."""
        return self.container + self.wake + self.gib * 2**30 / 1e9 / gb_per_second


COLD_STARTS: Final = {"none": ColdStart(1.0, 2.1, 26.6), "fp8": ColdStart(1.0, 1.2, 16.7)}
READING: Final = (1.0, 2.5)
"""GB/s from Modal's storage, as Modal says; what our snapshots do there, nobody has measured."""


FIRST_START: Final = 460.0
"""Seconds of a start without a snapshot to restore. Others measured it on Modal, for a model of
27 B parameters in fp8 on an A100; ours has never run there."""


def cold_start(quantization: Quantization) -> float:
    """Seconds of a cold start, at the middle of `READING`: the default wherever one is counted."""
    return COLD_STARTS[quantization].seconds(sum(READING) / 2)
