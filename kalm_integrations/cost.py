"""`kalm cost`: what KaLM costs on each of Modal's GPUs, for a corpus and for queries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import xxhash

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.models import Quantization

if TYPE_CHECKING:
    from modal_backend.costs import Choice

TYPES: Final = {"none": "bf16", "fp8": "fp8", "int8": "int8"}
_TABLES: Final = (
    {
        "dollars_per_hour": ("$/hour", "{:.2f}"),
        "tokens_per_second": ("tokens/s", "{:,.0f}"),
        "basis": ("", "{}"),
        "dollars_per_million": ("$/M tokens", "{:.3f}"),
        "dollars_per_million_at_utilization": ("at {utilization:.0%} use", "{:.3f}"),
    },
    {"corpus_hours": ("{tokens:,} tokens, hours", "{:,.1f}"), "corpus_dollars": ("$", "{:,.2f}")},
    {
        "hours_up_per_day": ("{queries_per_day:,} queries a day, hours up", "{:.1f}"),
        "queries_waiting": ("waiting for a start", "{:.1%}"),
        "dollars_per_month": ("$/month", "{:,.0f}"),
        "always_on_dollars_per_month": ("always on", "{:,.0f}"),
    },
)
"""Fields of the document, with headings and formats: the GPUs, a corpus, queries."""


def show(document: dict[str, Any]) -> None:
    """Print a document of `report` as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    rows = [row for row in document["choices"] if not row["problem"]]
    for columns in _TABLES:
        if rows and columns.keys() <= rows[0].keys():
            table = Table("GPU", "type", box=None, pad_edge=False)
            for heading, _ in columns.values():
                table.add_column(heading.format(**document), justify="right")
            for row in rows:
                cells = (form.format(row[name]) for name, (_, form) in columns.items())
                table.add_row(row["gpu"], TYPES[row["quantization"]], *cells)
            console.print(table, "")
    for row in document["choices"]:
        if row["problem"]:
            kind = TYPES[row["quantization"]]
            console.print(f"Not possible: {row['gpu']} in {kind} {row['problem']}.")
    for assumption in document["assumptions"]:
        console.print("{basis}: {figure}, {source}".format(**assumption))


def report(
    gpus_named: Sequence[str],
    *,
    quantization: Quantization | None,
    utilization: float,
    tokens: int | None,
    queries: int | None,
    scaledown_window: int | None,
    cold_start: int | None,
) -> dict[str, Any]:
    """The JSON document of `kalm cost`, whose help explains the options; docs/costs.md has the
    fields. Needs no network and starts nothing.

    Raises:
        ConfigurationError: A GPU is unknown, or options do not go together.
    """
    from modal_backend import costs, gpus
    from modal_backend.settings import DeploySettings

    try:
        choices = costs.choices(gpus_named, quantization)
    except ValueError as error:
        raise ConfigurationError(f"--{error}.") from error
    if (scaledown_window or cold_start) and not (tokens or queries):
        raise ConfigurationError(
            "--scaledown-window and --cold-start go with a corpus or with --queries-per-day."
        )
    window = scaledown_window or DeploySettings.model_fields["scaledown_window"].default
    load, restore = (cold_start or s for s in (gpus.FIRST_START, gpus.SNAPSHOT_START))

    def row(choice: Choice) -> dict[str, Any]:
        million = 1e6 * choice.dollars / choice.rate.tokens
        fields: dict[str, Any] = {
            "gpu": choice.gpu,
            "quantization": choice.quantization,
            "problem": choice.problem or None,
            "dollars_per_hour": round(3600 * choice.dollars, 4),
        }
        if choice.problem:
            return fields
        fields |= {
            "tokens_per_second": choice.rate.tokens,
            "basis": "measured" if choice.rate.measured else "calculated",
            "dollars_per_million": million,
            "dollars_per_million_at_utilization": million / utilization,
        }
        if tokens:
            job = choice.job(tokens, window, load)
            fields |= {"corpus_hours": job.hours, "corpus_dollars": job.dollars}
        if queries:
            up, month = costs.uptime(queries, window, restore), 30 * costs.DAY * choice.dollars
            fields |= {
                "hours_up_per_day": 24 * up.share,
                "queries_waiting": up.waiting,
                "dollars_per_month": up.share * month,
                "always_on_dollars_per_month": month,
            }
        return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in fields.items()}

    machine = "{none} GiB of memory (fp8 and int8: {fp8})".format(**gpus.HOST_GIB)
    starts = f"{load:g} s until a corpus starts (model loaded), {restore:g} s until queries do"
    assumptions = [
        *(
            ("measured", f"{made.tokens:,.0f} tokens/s on {gpu} in {TYPES[kind]}", made.source)
            for (gpu, kind), made in gpus.MEASURED.items()
        ),
        ("calculated", "tokens/s on other GPUs", gpus.CALCULATED),
        ("listed", f"prices of a GPU, {gpus.CORES:g} cores, {machine}", gpus.PRICES),
        ("given", starts, "--cold-start") if cold_start else ("listed", starts, gpus.STARTS),
        ("calculated", f"uptime; a container stops after {window} s without work", costs.MODEL),
    ]
    return {
        "assumptions": [{"basis": b, "figure": f, "source": s} for b, f, s in assumptions],
        "utilization": utilization,
        "tokens": tokens,
        "queries_per_day": queries,
        "choices": [row(choice) for choice in choices],
    }


def count_tokens(path: Path, text_column: str | None) -> int:
    """Estimated tokens of a corpus that `kalm embed` reads; identical texts count once, and rows
    that cannot be embedded do not.

    Raises:
        ConfigurationError: It cannot be read, or no text can be embedded.
        ImportError: The extra "bulk" is not installed.
    """
    from kalm_integrations.batching import estimate_tokens
    from kalm_integrations.readers.source import rows
    from kalm_integrations.validation import why_invalid

    seen, tokens = set[bytes](), 0
    for row in rows(str(path), text_column):
        if why_invalid(row.text, "end") is not None:
            continue
        data = row.text.encode()
        if (digest := xxhash.xxh3_128_digest(data)) not in seen:
            seen.add(digest)
            tokens += estimate_tokens(len(data))
    if not tokens:
        raise ConfigurationError(f"--corpus: {path} has no text that can be embedded.")
    return tokens
