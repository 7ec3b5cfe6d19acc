"""What KaLM costs on each GPU: a million tokens, a corpus, a day's traffic.

Only arithmetic: `gpus` has the figures, and says which of them were measured.
"""

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
"""$ for a million tokens, for comparison. Second-hand: collected in November 2026, not from the
providers' own pages. Each counts tokens with its own tokenizer."""

QUERY_TOKENS: Final = 40
"""Of a short question with its instruction, to see whether one container keeps up."""


@dataclass(frozen=True, slots=True)
class Uptime:
    """A service that scales to zero, in the long run.

    Attributes:
        share: Of all time, that a container is up and paid.
        starts: Cold starts a day.
        waiting: Of all queries, those that wait for a cold start.
    """

    share: float
    starts: float
    waiting: float


def uptime(queries_per_day: float, window: float, start: float) -> Uptime:
    """How long a container is up, for queries that come evenly spread (Poisson).

    With λ queries a second, a container that takes C seconds to start and goes T seconds after
    the last query (T from the end of the start, for those that came during it):

        once ready, it stays for (exp(λT) - 1) / λ on average, the busy period of M/D/∞ with T;
        then it is down for 1 / λ, until the next query.

    So of each cycle of C + exp(λT) / λ, all but 1 / λ is paid, and of its λC + exp(λT) queries
    1 + λC wait. Exact but for the milliseconds that a query itself takes. Real traffic comes in
    bursts: that makes fewer starts and less uptime.

    Args:
        queries_per_day: On average; more than 0.
        window: T, the deployment's `scaledown_window`.
        start: C.
    """
    each_second = queries_per_day / DAY
    # exp(-λT) instead of exp(λT), which overflows: no query comes for as long as the window.
    silence = math.exp(-each_second * window)
    during = each_second * start
    cycles = silence / (1 + during * silence)  # for each query
    return Uptime(share=1 - cycles, starts=queries_per_day * cycles, waiting=(1 + during) * cycles)


@dataclass(frozen=True, slots=True)
class Job:
    """A corpus, embedded at once by one container: start, full load, idle window."""

    hours: float
    dollars: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """Queries for a month. `starts_per_month` is the part of `per_month` that cold starts take."""

    uptime: Uptime
    per_month: float
    starts_per_month: float
    always_on: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A GPU and what it computes in.

    Attributes:
        gpu: One of `gpus.GPUS`.
        quantization: "none" is bf16.
        problem: Why it does not run; empty if it does.
        needed_gib: Of the GPU's memory.
        rate: Tokens a second.
        dollars: A second of a container.
        query_seconds: What a query takes at least; calculated.
    """

    gpu: str
    quantization: Quantization
    problem: str
    needed_gib: float
    rate: Rate
    dollars: float
    query_seconds: float

    def per_million(self, utilization: float = 1.0) -> float:
        """$ for a million tokens.

        Args:
            utilization: Share of a container's paid time in which it computes.
        """
        return 1e6 * self.dollars / self.rate.tokens / utilization

    def job(self, tokens: float, window: float, start: float) -> Job:
        """A corpus at full load, with one cold start and the wait after it.

        Args:
            tokens: Of the corpus.
            window: Seconds that the container waits for more.
            start: Seconds of the cold start.
        """
        seconds = start + tokens / self.rate.tokens
        return Job(hours=seconds / 3600, dollars=(seconds + window) * self.dollars)

    def traffic(self, queries_per_day: float, window: float, start: float) -> Traffic:
        """Queries, by `uptime`; the same arguments."""
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
    """What there is to choose from, GPU by GPU.

    Args:
        names: These GPUs; none are all.
        quantization: This one; None is both.

    Raises:
        ValueError: A GPU is unknown.
    """
    for name in names:
        gpus.gpu_named(name)
    wanted = {name.removesuffix("!") for name in names} or gpus.GPUS.keys()
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
        if name in wanted
        for kind in gpus.QUANTIZATIONS
        if quantization in (None, kind)
    ]
