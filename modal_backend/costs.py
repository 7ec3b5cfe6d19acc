"""Calculations of `kalm cost`: a corpus, and queries on a service that scales to zero."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, NamedTuple

from kalm_integrations.models import Quantization
from modal_backend import gpus
from modal_backend.gpus import Rate

DAY: Final = 86_400
MODEL: Final = "for queries that arrive independently (Poisson), docs/costs.md"
"""What `uptime` assumes."""


class Uptime(NamedTuple):
    """Long-run averages: the share of time that a container is up and billed, cold starts per
    day, and the share of queries that wait for one."""

    share: float
    starts: float
    waiting: float


def uptime(queries_per_day: float, window: float, start: float) -> Uptime:
    """Uptime for Poisson arrivals.

    With λ queries per second, a window T and a start C, the share of time that is billed is
    1 - 1 / (λC + exp(λT)), the cold starts per second are λ / (λC + exp(λT)), and the share of
    queries that wait for one is (1 + λC) / (λC + exp(λT)).

    Args:
        queries_per_day: Average, above 0.
        window: Seconds that an idle container waits (`scaledown_window`).
        start: Seconds of a cold start.
    """
    rate = queries_per_day / DAY
    idle = math.exp(-rate * window)  # exp(rate * window) would overflow
    cycles = idle / (1 + rate * start * idle)  # per query
    return Uptime(1 - cycles, queries_per_day * cycles, (1 + rate * start) * cycles)


class Job(NamedTuple):
    """A corpus in one container: a cold start, full load, the idle window."""

    hours: float
    dollars: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A GPU and a quantization ("none" is bf16). `dollars` are per second of a container."""

    gpu: str
    quantization: Quantization
    problem: str
    rate: Rate
    dollars: float

    def job(self, tokens: float, window: float, start: float) -> Job:
        """Time and price of embedding `tokens`; `window` and `start` as in `uptime`."""
        seconds = start + tokens / self.rate.tokens
        return Job(hours=seconds / 3600, dollars=(seconds + window) * self.dollars)


def choices(names: Collection[str] = (), quantization: Quantization | None = None) -> list[Choice]:
    """All GPUs and quantizations, or the named ones.

    Raises:
        ValueError: A GPU is unknown.
    """
    for name in names:
        gpus.gpu_named(name)
    wanted = {name.removesuffix("!") for name in names} or gpus.GPUS.keys()
    pairs = [(gpu, kind) for gpu in gpus.GPUS if gpu in wanted for kind in gpus.QUANTIZATIONS]
    return [
        Choice(
            *(gpu, kind, gpus.problem(gpu, kind), gpus.rate(gpu, kind)),
            dollars=gpus.container_dollars([gpu], kind),
        )
        for gpu, kind in pairs
        if quantization in (None, kind)
    ]
