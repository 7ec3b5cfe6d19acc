"""docs/bulk-on-modal.md: its calculation is the code's, its names are those of the records."""

from __future__ import annotations

from pathlib import Path

from kalm_integrations.bulk.forecast import Forecast, forecast
from kalm_integrations.bulk.on_modal import records as job_state
from kalm_integrations.bulk.on_modal import worker_pool
from kalm_integrations.bulk.options import SHARD_ROWS
from modal_backend.costs import choices
from modal_backend.settings import DeploySettings

PAGE = (Path(__file__).parents[2] / "docs" / "bulk-on-modal.md").read_text()


MILLION = 1_000_000


def predicted(documents: int, containers: int) -> Forecast:
    """For documents of 200 tokens on an H100."""
    (gpu,) = choices(["H100"], "none")
    return forecast(gpu, documents * 200, -(-documents // SHARD_ROWS), containers)


def test_the_calculation_is_what_the_function_says() -> None:
    for containers in (1, 16):
        some, many = (predicted(number * MILLION, containers) for number in (10, 1000))
        assert (
            f"| {containers} | {some.hours:.1f} | {some.dollars:,.0f} "
            f"| {many.hours / 24:.1f} | {many.dollars:,.0f} |"
        ) in PAGE
    for number in (10, 1000):  # 7,680 bytes a vector, 800 of text
        assert f"{number * MILLION * 8480 / 1e9:,.0f} GB" in PAGE


def test_numbers_and_names() -> None:
    assert f"`--max-containers` (default {worker_pool.MAX_CONTAINERS})" in PAGE
    assert f"up to {job_state.MOST_ATTEMPTS} times" in PAGE
    assert job_state.MOST_CANARIES == 3
    assert "after three of them the job stops" in PAGE
    assert f"the {worker_pool.SCALEDOWN_WINDOW} seconds for which it waits" in PAGE
    assert f"`{DeploySettings.model_fields['bulk_volume'].default}`" in PAGE
