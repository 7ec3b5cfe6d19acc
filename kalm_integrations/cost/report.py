"""What `kalm cost` prints. "~" stands before every figure that was calculated."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from kalm_integrations.cost.corpus import Corpus
from kalm_integrations.terminal import width, wrapped
from modal_backend import gpus
from modal_backend.costs import API_PRICES, MONTH, Choice
from modal_backend.gpus import HOST_GIB, MEASURED, REFERENCE, Quantization

_TYPES: Final = {"none": "bf16", "fp8": "fp8"}
_WHO: Final = "Modal's list prices of November 2026, without a region"
_APIS: Final = (
    "list prices collected in November 2026, second-hand; their tokenizers count otherwise"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to print besides the table.

    Attributes:
        corpus: To be embedded at once.
        queries_per_day: On average.
        window: Seconds that an idle container waits.
        start: Seconds of a cold start; None is the budget.
        utilization: For the second price of a million tokens.
    """

    corpus: Corpus | None = None
    queries_per_day: int | None = None
    window: int
    start: float | None = None
    utilization: float

    def start_of(self, choice: Choice) -> float:
        """Seconds of this one's cold start."""
        return gpus.cold_start(choice.quantization) if self.start is None else self.start


def text(choices: Sequence[Choice], asked: Asked) -> str:
    """For people."""
    able = [choice for choice in choices if not choice.problem]
    blocks = [_opening()]
    if able:
        blocks += [_prices(able, asked.utilization), *_notes(able)]
    if able and asked.corpus:
        blocks += _job(able, asked.corpus, asked)
    if able and asked.queries_per_day:
        blocks += _traffic(able, asked.queries_per_day, asked)
    unable = [wrapped(f"{_name(c)} {c.problem}", "- ") for c in choices if c.problem]
    if unable:
        blocks.append("\n".join(["Not possible:", *unable]))
    return "\n\n".join(blocks)


def document(choices: Sequence[Choice], asked: Asked) -> str:
    """All of it as JSON; docs/costs.md has the fields."""
    content = {
        "prices": _WHO,
        "step_tokens": gpus.step_tokens(),
        "kv_gib": round(gpus.kv_gib(), 2),
        "utilization": asked.utilization,
        "scaledown_window": asked.window,
        "corpus": asdict(asked.corpus) if asked.corpus else None,
        "queries_per_day": asked.queries_per_day,
        "measured": [asdict(made) for made in MEASURED],
        "choices": [_fields(choice, asked) for choice in choices],
        "apis": {"source": _APIS, "dollars_per_million": API_PRICES},
    }
    return json.dumps(content, indent=2)


def _fields(choice: Choice, asked: Asked) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "gpu": choice.gpu,
        "quantization": choice.quantization,
        "problem": choice.problem or None,
        "gib": gpus.GPUS[choice.gpu].gib,
        "needed_gib": round(choice.needed_gib, 1),
        "dollars_per_hour": _rounded(3600 * choice.dollars),
    }
    if choice.problem:
        return fields
    start = asked.start_of(choice)
    fields |= {
        "tokens_per_second": _rounded(choice.rate.tokens),
        "measured": choice.rate.measured,
        "source": choice.rate.source,
        "dollars_per_million": _rounded(choice.per_million()),
        "dollars_per_million_at_utilization": _rounded(choice.per_million(asked.utilization)),
        "query_seconds_at_least": _rounded(choice.query_seconds),
        "cold_start_seconds": _rounded(start),
    }
    if asked.corpus:
        job = choice.job(asked.corpus.tokens, asked.window, start)
        fields["corpus"] = {"hours": _rounded(job.hours), "dollars": _rounded(job.dollars)}
    if asked.queries_per_day:
        month = choice.traffic(asked.queries_per_day, asked.window, start)
        fields["traffic"] = {
            "hours_up_per_day": _rounded(24 * month.uptime.share),
            "cold_starts_per_day": _rounded(month.uptime.starts),
            "queries_waiting": _rounded(month.uptime.waiting),
            "cold_start_dollars_per_month": _rounded(month.starts_per_month),
            "dollars_per_month": _rounded(month.per_month),
            "always_on_dollars_per_month": _rounded(month.always_on),
            "most_queries_per_day": _rounded(choice.most_queries),
        }
    return fields


def _opening() -> str:
    return wrapped(
        "KaLM-Embedding-Gemma3-12B in one container, as `kalm deploy` deploys it: steps of "
        f"{gpus.step_tokens():,} tokens, {gpus.kv_gib():.1f} GiB of KV cache, {gpus.CORES:g} "
        f"cores, {HOST_GIB['none']} GiB of host memory ({HOST_GIB['fp8']} with fp8). {_WHO}."
    )


def _prices(choices: Sequence[Choice], utilization: float) -> str:
    def row(choice: Choice) -> list[str]:
        speed = f"{_mark(choice)}{_speed(choice.rate.tokens)}"
        return [
            choice.gpu,
            _TYPES[choice.quantization],
            f"{gpus.GPUS[choice.gpu].gib}",
            f"{choice.needed_gib:.0f}",
            f"{3600 * choice.dollars:.2f}",
            speed if choice.rate.measured else "",
            "" if choice.rate.measured else speed,
            f"{_mark(choice)}{choice.per_million():.3f}",
            f"{_mark(choice)}{choice.per_million(utilization):.3f}",
            f"~{1000 * choice.query_seconds:.0f}",
        ]

    busy, ms = f"{utilization:.0%} busy", "ms, at least"
    heads = [
        ("", "", "GiB", "GiB", "$ an", "tokens/s", "tokens/s", "$/M tokens", "$/M tokens", "query"),
        ("GPU", "type", "has", "needs", "hour", "measured", "calculated", "always busy", busy, ms),
    ]
    return _table(heads, map(row, choices))


def _notes(choices: Sequence[Choice]) -> Iterator[str]:
    kinds: list[Quantization] = sorted(
        {choice.quantization for choice in choices}, key=gpus.QUANTIZATIONS.index
    )
    if any(not choice.rate.measured for choice in choices):
        known = [gpus.measured_reference(kind) for kind in kinds]
        shares = ", ".join(
            f"{gpus.share_of_peak(made):.0%} in {_TYPES[made.quantization]}" for made in known
        )
        yield wrapped(
            "~ is calculated, and not measured on that card: its data sheet's TFLOP/s, of which "
            f"the {REFERENCE} reached {shares}. A query takes at least the time in which all "
            "weights are read once."
        )
    if "fp8" in kinds:
        yield wrapped(
            "fp8 is another vector space; how well it retrieves with KaLM, nobody has measured."
        )
    used = {(choice.gpu, choice.quantization) for choice in choices if choice.rate.measured}
    sources = {made.source for made in MEASURED if (made.gpu, made.quantization) in used}
    if sources:
        yield "\n".join(wrapped(f"Measured: {source}.") for source in sorted(sources))


def _job(choices: Sequence[Choice], corpus: Corpus, asked: Asked) -> Iterator[str]:
    yield wrapped(
        f"Your corpus: {corpus.tokens:,.0f} tokens ({corpus.origin}). At once, in one container: a "
        f"cold start, full load, the wait of {asked.window} s afterwards."
    )

    def row(choice: Choice) -> list[str]:
        job = choice.job(corpus.tokens, asked.window, asked.start_of(choice))
        mark = _mark(choice)
        shown = [f"{mark}{_short(job.hours)}", f"{mark}{_dollars(job.dollars)}"]
        return [choice.gpu, _TYPES[choice.quantization], *shown]

    yield _table([["GPU", "type", "hours", "$"]], map(row, choices))
    priced = [[name, _dollars(corpus.tokens / 1e6 * price)] for name, price in API_PRICES.items()]
    yield wrapped(f"As many tokens through an API that sells another model: {_APIS}.")
    yield _table([["API", "$"]], priced)


def _traffic(choices: Sequence[Choice], queries: int, asked: Asked) -> Iterator[str]:
    starts = {f"{_TYPES[c.quantization]} {asked.start_of(c):.0f} s" for c in choices}
    yield wrapped(
        f"Your traffic: {queries:,} queries a day, evenly spread (Poisson); a container goes after "
        f"{asked.window} s without one; a cold start takes {', '.join(sorted(starts))}. All of it "
        "is calculated."
    )

    def row(choice: Choice) -> list[str]:
        month = choice.traffic(queries, asked.window, asked.start_of(choice))
        return [
            choice.gpu,
            _TYPES[choice.quantization],
            f"~{24 * month.uptime.share:.1f}",
            f"~{_short(month.uptime.starts)}",
            f"~{month.uptime.waiting:.1%}",
            f"~{_dollars(month.starts_per_month)}",
            f"~{_dollars(month.per_month)}",
            _dollars(month.always_on),
        ]

    heads = [
        ["", "", "hours up", "starts", "queries", "$ a month", "$ a month", "$ a month"],
        ["GPU", "type", "a day", "a day", "waiting", "in starts", "in all", "always on"],
    ]
    yield _table(heads, map(row, choices))
    yield wrapped(
        f"A month has {MONTH} days. Bursts instead of even spread: fewer starts, less uptime. "
        "Always on is --min-containers 1."
    )
    slow = [choice for choice in choices if choice.most_queries < queries]
    if slow:
        yield "\n".join(
            wrapped(
                f"{_name(c)} embeds about {c.most_queries:,.0f} short queries a day: too few", "! "
            )
            for c in slow
        )


def _table(heads: Sequence[Sequence[str]], rows: Iterator[list[str]] | list[list[str]]) -> str:
    """Names to the left, numbers to the right; in parts, where the terminal is too narrow."""
    cells = [*heads, *rows]
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    names = 2 if "type" in heads[-1] else 1

    def line(row: Sequence[str], columns: Sequence[int]) -> str:
        padded = [
            row[place].ljust(wide[place]) if place < names else row[place].rjust(wide[place])
            for place in columns
        ]
        return "  ".join(padded).rstrip()

    parts: list[list[int]] = [[*range(names)]]
    for place in range(names, len(wide)):
        if len(parts[-1]) > names and sum(wide[p] + 2 for p in [*parts[-1], place]) - 2 > width():
            parts.append([*range(names)])
        parts[-1].append(place)
    return "\n\n".join("\n".join(line(row, columns) for row in cells) for columns in parts)


def _name(choice: Choice) -> str:
    return f"{choice.gpu} in {_TYPES[choice.quantization]}"


def _mark(choice: Choice) -> str:
    return "" if choice.rate.measured else "~"


def _speed(tokens: float) -> str:
    return f"{round(tokens, -2):,.0f}"


def _dollars(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.3f}"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2f}"


def _rounded(number: float) -> float:
    """Without digits that mean nothing."""
    return float(f"{number:.6g}")
