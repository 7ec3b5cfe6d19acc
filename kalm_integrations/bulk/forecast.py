"""`kalm embed --dry-run`: how much there is, and what it takes here or on Modal. Arithmetic with
figures that `modal_backend.gpus` calls measured or calculated; no run on Modal is behind them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from kalm_integrations.bulk.on_modal import worker_pool
from kalm_integrations.bulk.plan import Plan
from kalm_integrations.bulk.progress import counted, duration
from kalm_integrations.client import KalmClient
from modal_backend import gpus
from modal_backend.costs import Choice

CONTAINERS: Final = (1, 4, 16)


@dataclass(frozen=True, slots=True)
class Forecast:
    """A job on some containers, of which there are at most as many as shards; the price includes
    each container's start, and its idle time at the end."""

    containers: int
    hours: float
    dollars: float


def forecast(gpu: Choice, tokens: float, shards: int, containers: int) -> Forecast:
    """Shards of one size, handed out one by one: the last round may be short.

    Every container loads the model: those of the first wave start before there is a snapshot.
    """
    working, start = min(containers, max(1, shards)), gpus.FIRST_START
    rounds = -(-shards // working)
    hours = (start + rounds * tokens / max(1, shards) / gpu.rate.tokens) / 3600
    paid = tokens / gpu.rate.tokens + working * (start + worker_pool.SCALEDOWN_WINDOW)
    return Forecast(containers=working, hours=hours, dollars=paid * gpu.dollars)


def shown(
    plan: Plan, client: KalmClient, gpu: Choice | None, *, on_modal: bool, as_json: bool
) -> str:
    """The dry run's answer, as text or as one JSON document."""
    data = _data(plan, client, gpu, on_modal=on_modal)
    return json.dumps(data, indent=2) if as_json else _text(data, plan)


def _data(plan: Plan, client: KalmClient, gpu: Choice | None, *, on_modal: bool) -> dict[str, Any]:
    kept = plan.rows - (plan.bad if plan.options.on_error == "skip" else 0)
    itemsize = np.dtype(client.config.vector_dtype).itemsize + (plan.options.also is not None)
    shards = -(-plan.rows // plan.options.shard_rows)
    data: dict[str, Any] = {
        "rows": plan.rows,
        "texts": plan.distinct,
        "copies": plan.rows - plan.bad - plan.distinct,
        "bad_rows": plan.bad,
        "tokens": plan.tokens,
        "shards": shards,
        "vector_bytes": kept * client.vector_dimensions * itemsize or None,
    }
    if gpu is None:
        return data
    data |= {
        "gpu": gpu.gpu,
        "tokens_per_second": gpu.rate.tokens,
        "measured": gpu.rate.measured,
    }
    if on_modal:
        made = [forecast(gpu, plan.tokens, shards, number) for number in CONTAINERS]
        return data | {"on_modal": [asdict(each) for each in dict.fromkeys(made)]}
    from modal_backend.settings import DeploySettings

    window = DeploySettings.model_fields["scaledown_window"].default
    job = gpu.job(plan.tokens, window, gpus.SNAPSHOT_START)
    return data | {"hours": job.hours, "dollars": job.dollars}


def _text(data: dict[str, Any], plan: Plan) -> str:
    copies = f"{data['copies']:,} {'copy' if data['copies'] == 1 else 'copies'}"
    lines = [
        f"{counted(data['rows'], 'row')}: {counted(data['texts'], 'text')} to embed, {copies}, "
        f"{data['bad_rows']:,} that cannot be embedded",
        f"about {counted(data['tokens'], 'token')} (estimated, 4 bytes a token)",
    ]
    if plan.bad and plan.options.on_error == "fail":
        lines.append(f"--on-error fail would refuse them: {'; '.join(plan.examples)}")
    if data["vector_bytes"]:
        gib = data["vector_bytes"] / 2**30
        lines.append(f"{gib:,.2f} GiB of vectors, in {counted(data['shards'], 'shard')}")
    if "gpu" not in data:
        return "\n".join([*lines, "--gpu NAME adds time and cost; `kalm cost` compares GPUs"])
    how = "measured" if data["measured"] else "calculated"
    rate = f"{data['gpu']} ({data['tokens_per_second']:,.0f} tokens/s, {how})"
    if "on_modal" not in data:
        lines.append(
            f"about {duration(3600 * data['hours'])} and ${data['dollars']:,.2f} on one {rate}, "
            "with the service's start; the price includes its idle time at the end"
        )
        return "\n".join(lines)
    lines.append(
        f"on Modal, on {rate}, with the load of the model in each container; the price includes "
        f"{worker_pool.SCALEDOWN_WINDOW} s of idle time at the end:"
    )
    lines.append(f"containers  {'time':>12}  {'$':>10}")
    for row in data["on_modal"]:
        time = duration(3600 * row["hours"])
        lines.append(f"{row['containers']:>10}  {time:>12}  {row['dollars']:>10,.2f}")
    return "\n".join(lines)
