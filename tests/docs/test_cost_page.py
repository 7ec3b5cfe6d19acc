"""docs/costs.md says what `kalm cost` says. After a new measurement, paste its output there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kalm_integrations.cli import main
from modal_backend import gpus
from modal_backend.costs import Choice, choices
from modal_backend.settings import DeploySettings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "costs.md").read_text()
COMMANDS, TABLE = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def as_the_page_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(ROOT)


def test_the_table_is_what_the_command_prints(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["cost"]) == 0
    assert capfd.readouterr().out == TABLE


@pytest.mark.parametrize("command", COMMANDS.splitlines())
def test_every_command_runs(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    kalm, *arguments = shlex.split(command, comments=True)
    assert (kalm, main(arguments)) == ("kalm", 0)
    assert capfd.readouterr().err == ""


def test_the_budget_of_a_cold_start() -> None:
    slow, fast = gpus.READING
    section = PAGE.split("## A cold start\n")[1]
    assert f"read at {slow:g} to {fast:g} GB/s" in section
    for quantization, kind in (("none", "bf16"), ("fp8", "fp8")):
        cells = re.search(rf"^\| {kind} \| (.*) \|$", section, re.MULTILINE)
        assert cells
        budget = gpus.COLD_STARTS[quantization]
        reading = [budget.seconds(rate) - budget.container - budget.wake for rate in (fast, slow)]
        assert cells[1].split(" | ") == [
            f"{budget.container:g}",
            f"{budget.wake:g}",
            f"{budget.gib:g}",
            f"{reading[0]:.0f} to {reading[1]:.0f}",
            f"{gpus.cold_start(quantization):.0f}",
        ]


def test_the_data_sheets() -> None:
    (said,) = re.findall(r"TFLOP/s in bf16: (.*?); fp8 is about twice that", PAGE)
    for name, kind in gpus.GPUS.items():
        known = name.partition("-")[0]
        found = re.search(rf"\b{known}(?: and \w+)? ([\d,]+)", said)
        assert found, name
        assert float(found[1].replace(",", "")) == kind.bf16


def test_what_is_said_of_the_default_and_of_the_others() -> None:
    def one(gpu: str) -> Choice:
        (choice,) = choices([gpu], "none")
        return choice

    default = DeploySettings()
    assert (default.gpu, default.quantization) == (("A100-40GB",), "none")
    able = [choice for choice in choices(quantization="none") if not choice.problem]
    cheapest = sorted(able, key=lambda choice: choice.dollars)
    assert [choice.gpu for choice in cheapest[:2]] == ["L40S", "A100-40GB"]
    assert one("L40S").per_million() < one("A100-40GB").per_million()
    assert one("H100").per_million() < one("L40S").per_million()
    readme = " ".join((ROOT / "README.md").read_text().split())
    starts = (gpus.cold_start("none"), 70.0)
    window = default.scaledown_window
    quick, slow = (one("A100-40GB").traffic(72, window, seconds) for seconds in starts)
    day = (
        f"about ${quick.per_month / 30:.0f} to ${slow.per_month / 30:.0f} a day "
        f"({starts[0]:.0f} to 70 s per cold start); {100 * quick.uptime.waiting:.0f} to "
        f"{100 * slow.uptime.waiting:.0f} % of the queries wait for a cold start"
    )
    assert f"72 queries a day, evenly spread, on the default GPU | {day}" in readme
    assert f"`--min-containers 1` avoids that for ${quick.always_on / 30:.0f} a day" in readme
    assert f"about ${one('H100').per_million():.2f} a million tokens" in readme
    assert one("H100").rate.measured
    assert not one("L40S").rate.measured
    assert not one("A100-40GB").rate.measured
