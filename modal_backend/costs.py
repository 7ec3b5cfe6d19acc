"""Calculates the costs of KaLM: a million tokens, a corpus, a day's traffic; see `gpus`."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from modal_backend import gpus
from modal_backend.gpus import Quantization, Rate

DAY: Final = 86_400
MONTH: Final = 30  # days

API_PRICES: Final = {
    "OpenAI text-embedding-3-large": 0.13,
    "OpenAI text-embedding-3-small": 0.02,
    "Voyage voyage-4": 0.06,
    "Cohere embed-v4": 0.10,
    "Google gemini-embedding-001": 0.15,
}
"""$ for a million tokens, collected in November 2026 from second-hand sources. Each provider counts
tokens with its own tokenizer."""

QUERY_TOKENS: Final = 40
"""Of a short question with its instruction."""


@dataclass(frozen=True, slots=True)
class Uptime:
    """Long-run averages of a service that scales to zero."""

    share: float  # of the time in which a container is up and billed
    starts: float  # cold starts a day
    waiting: float  # share of the queries that wait for a cold start


def uptime(queries_per_day: float, window: float, start: float) -> Uptime:
    """How long a container is up, for queries of a Poisson process.

    With λ queries a second, a container that takes C seconds to start and stops T seconds after
    the last query (T from the end of the start, for queries during it):

        once ready, it stays for (exp(λT) - 1) / λ on average, the busy period of M/D/∞ with T;
        then it is down for 1 / λ, until the next query.

    So of each cycle of C + exp(λT) / λ, all but 1 / λ is billed, and of its λC + exp(λT) queries
    1 + λC wait. Exact except for the milliseconds of the query itself. Bursts of real traffic mean
    fewer starts and less uptime.

    Args:
        queries_per_day: On average; more than 0.
        window: T, the deployment's `scaledown_window`.
        start: C.
    """
    rate = queries_per_day / DAY
    idle = math.exp(-rate * window)  # P(no query within T); exp(λT) would overflow
    during = rate * start
    cycles = idle / (1 + during * idle)  # for each query
    return Uptime(share=1 - cycles, starts=queries_per_day * cycles, waiting=(1 + during) * cycles)


@dataclass(frozen=True, slots=True)
class Job:
    """A corpus embedded by one container: start, full load, idle window."""

    hours: float
    dollars: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """$ for the queries of a month."""

    uptime: Uptime
    per_month: float
    starts_per_month: float  # the part of `per_month` for cold starts
    always_on: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A GPU and a quantization."""

    gpu: str
    quantization: Quantization  # "none" is bf16
    problem: str  # why KaLM does not run on it, or empty
    needed_gib: float  # of the GPU's memory
    rate: Rate
    dollars: float  # for a second of a container
    query_seconds: float  # the least time of a query; calculated

    def per_million(self, utilization: float = 1.0) -> float:
        """$ for a million tokens, if the container computes in this share of its billed time."""
        return 1e6 * self.dollars / self.rate.tokens / utilization

    def job(self, tokens: float, window: float, start: float) -> Job:
        """Time and price of a corpus; `window` and `start` as in `uptime`."""
        seconds = start + tokens / self.rate.tokens
        return Job(hours=seconds / 3600, dollars=(seconds + window) * self.dollars)

    def traffic(self, queries_per_day: float, window: float, start: float) -> Traffic:
        """Price of queries; the arguments of `uptime`."""
        up = uptime(queries_per_day, window, start)
        month = MONTH * DAY * self.dollars
        return Traffic(
            uptime=up,
            per_month=up.share * month,
            starts_per_month=MONTH * up.starts * start * self.dollars,
            always_on=month,
        )

    @property
    def most_queries(self) -> float:
        """Short queries a day that one container embeds."""
        return DAY * self.rate.tokens / QUERY_TOKENS


def choices(names: Collection[str] = (), quantization: Quantization | None = None) -> list[Choice]:
    """Return the choices for these GPUs and this quantization; by default for all.

    Raises:
        ValueError: A GPU is unknown.
    """
    for name in names:
        gpus.gpu_named(name)
    selected = {name.removesuffix("!") for name in names} or gpus.GPUS.keys()
    return [
        Choice(
            gpu=name,
            quantization=kind,
            problem=gpus.problem(name, kind),
            needed_gib=gpus.needed_gib(kind),
            rate=gpus.rate(name, kind),
            dollars=gpus.container_dollars([name], kind),
            query_seconds=gpus.query_seconds(name, kind),
        )
        for name in gpus.GPUS
        if name in selected
        for kind in gpus.QUANTIZATIONS
        if quantization in (None, kind)
    ]
