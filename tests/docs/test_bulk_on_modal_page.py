"""docs/bulk-on-modal.md: its calculation is the code's, its names are those of the records."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kalm_integrations.bulk import shards
from kalm_integrations.bulk.forecast import forecast
from kalm_integrations.bulk.on_modal import records as job_state
from kalm_integrations.bulk.on_modal import worker_pool
from kalm_integrations.bulk.options import SHARD_ROWS
from modal_backend.costs import choices
from modal_backend.settings import DeploySettings

PAGE = (Path(__file__).parents[2] / "docs" / "bulk-on-modal.md").read_text()


def large_table(documents: int) -> str:
    """200 tokens and 800 bytes a document, 7,680 bytes a vector, two commits a shard."""
    (gpu,) = choices(["H100"], "none")
    tokens, number = documents * 200, -(-documents // SHARD_ROWS)
    inside, outside = documents * 800 / 1e9, documents * 8480 / 1e9
    lines = [
        f"{documents:,} documents of 200 tokens: {tokens / 1e9:,.0f} G tokens, "
        f"{number:,} shards of {SHARD_ROWS:,} rows,",
        f"{inside:,.0f} GB of text into the Volume, {outside:,.0f} GB of shards out of it "
        "(float16, 3840 dimensions)",
        "",
        "containers      hours     days          $  shards/s  commits/s  MB/s written",
    ]
    for containers in (1, 4, 16, 64):
        made = forecast(gpu, tokens, number, containers)
        rate = number / (3600 * made.hours)
        lines.append(
            f"{made.containers:10}  {made.hours:9,.1f}  {made.hours / 24:7,.1f}  "
            f"{made.dollars:9,.0f}  {rate:8.3f}  {2 * rate:9.3f}  "
            f"{outside * 1e3 / (3600 * made.hours):12,.1f}"
        )
    return "\n".join(lines)


@pytest.mark.parametrize("documents", [10_000_000, 1_000_000_000])
def test_the_calculation_is_what_the_function_says(documents: int) -> None:
    assert large_table(documents) in PAGE


def test_figures_of_the_limits() -> None:
    shards = -(-1_000_000_000 // 8192)
    assert f"{shards:,}; sent in {-(-shards // 512)} requests of 512" in PAGE
    rows = re.findall(r"^ +(\d+) +([\d,.]+) +([\d.]+) .* ([\d.]+) +([\d.]+)$", PAGE, re.M)
    by_containers = {row[0]: row for row in rows[4:]}
    assert f"{by_containers['64'][2]} days. With 4 containers it takes" in PAGE
    assert f"it takes {by_containers['4'][2]}:" in PAGE
    assert f"{float(by_containers['64'][4]):.0f} MB/s written" in PAGE
    assert f"| {float(by_containers['64'][3]):.1f} a second |" in PAGE


def test_numbers_and_names() -> None:
    assert f"`--max-containers` (default {worker_pool.MAX_CONTAINERS})" in PAGE
    assert f"up to {job_state.MOST_ATTEMPTS} times" in PAGE
    assert job_state.MOST_CANARIES == 3
    assert "after three of them the job stops" in PAGE
    assert f"the {worker_pool.SCALEDOWN_WINDOW} seconds for which it waits" in PAGE
    assert f"`{DeploySettings.model_fields['bulk_volume'].default}`" in PAGE
    layout = PAGE.split("## In the Volume")[1]
    for name in (
        job_state.JOB,
        job_state.INPUT,
        job_state.RECORDS,
        job_state.RUNS,
        shards.FOLDER,
    ):
        assert name in layout
