"""What a job on Modal would take, by containers: arithmetic, of figures that `modal_backend.gpus`
calls measured or calculated. Nothing here was seen on Modal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from kalm_integrations.bulk.job_spec import SHARD_ROWS
from kalm_integrations.bulk.on_modal import worker_pool
from kalm_integrations.bulk.progress import duration
from modal_backend import gpus
from modal_backend.costs import Choice, choices

CONTAINERS: Final = (1, 4, 16)
LARGE: Final = (1, 4, 16, 64)
TOKENS_PER_DOCUMENT: Final = 200
_TEXT_BYTES: Final = 4 * TOKENS_PER_DOCUMENT
_VECTOR_BYTES: Final = 2 * 3840
_COMMITS: Final = 2
"""Of a shard: when it is taken, and when it is written."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """So many containers, from the first start to the last shard.

    Attributes:
        containers: That work; no more than there are shards.
        hours: Until all is written.
        dollars: Each container's start and wait at its end included.
    """

    containers: int
    hours: float
    dollars: float


def forecast(gpu: Choice, tokens: float, shards: int, containers: int) -> Forecast:
    """Shards are all of one size here, and handed out one by one: the last round may be short.

    Every container loads the model: those of the first wave start before there is a snapshot.
    """
    working, start = min(containers, shards), gpus.FIRST_START
    rounds = -(-shards // working)
    hours = (start + rounds * tokens / shards / gpu.rate.tokens) / 3600
    paid = tokens / gpu.rate.tokens + working * (start + worker_pool.SCALEDOWN_WINDOW)
    return Forecast(containers=working, hours=hours, dollars=paid * gpu.dollars)


def forecasts(gpu: Choice, tokens: float, shards: int) -> list[dict[str, Any]]:
    """For a dry run's JSON; the same number of containers once."""
    found = [forecast(gpu, tokens, shards, containers) for containers in CONTAINERS]
    return [asdict(made) for made in dict.fromkeys(found)]


def as_text(made: list[dict[str, Any]]) -> list[str]:
    """For a dry run's text."""
    rows = [("containers", "time", "$")]
    rows += [
        (str(row["containers"]), duration(3600 * row["hours"]), f"{row['dollars']:,.2f}")
        for row in made
    ]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, (10, 12, 10), strict=True))
        for row in rows
    ]


def large_table(documents: int, gpu: str = "H100") -> str:
    """The calculation of docs/bulk-on-modal.md, for one size of corpus."""
    (choice,) = choices([gpu], "none")
    tokens, shards = documents * TOKENS_PER_DOCUMENT, -(-documents // SHARD_ROWS)
    inside, outside = documents * _TEXT_BYTES / 1e9, documents * (_TEXT_BYTES + _VECTOR_BYTES) / 1e9
    lines = [
        f"{documents:,} documents of {TOKENS_PER_DOCUMENT} tokens: {tokens / 1e9:,.0f} G tokens, "
        f"{shards:,} shards of {SHARD_ROWS:,} rows,",
        f"{inside:,.0f} GB of text into the Volume, {outside:,.0f} GB of shards out of it "
        "(float16, 3840 dimensions)",
        "",
        "containers      hours     days          $  shards/s  commits/s  MB/s written",
    ]
    for containers in LARGE:
        made = forecast(choice, tokens, shards, containers)
        rate = shards / (3600 * made.hours)
        lines.append(
            f"{made.containers:10}  {made.hours:9,.1f}  {made.hours / 24:7,.1f}  "
            f"{made.dollars:9,.0f}  {rate:8.3f}  {_COMMITS * rate:9.3f}  "
            f"{outside * 1e3 / (3600 * made.hours):12,.1f}"
        )
    return "\n".join(lines)
