"""docs/costs.md and the README show figures of `kalm cost`. After a new measurement, paste its
output there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kalm_integrations.cli import main
from modal_backend import gpus
from modal_backend.costs import DAY, Choice, choices, uptime
from modal_backend.settings import DeploySettings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "costs.md").read_text()
COMMANDS, OUTPUT = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
ROW = re.compile(r"^\S+ +(?:bf16|fp8|int8) .*$", re.MULTILINE)


@pytest.fixture(autouse=True)
def working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(ROOT)


def test_the_page_has_the_figures_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    shown, *_ = OUTPUT.splitlines()
    assert main(shlex.split(shown)[2:]) == 0
    assert ROW.findall(OUTPUT) == ROW.findall(capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS.splitlines())
def test_every_command_of_the_page_runs(command: str) -> None:
    kalm, *arguments = shlex.split(command, comments=True)
    assert (kalm, main(arguments)) == ("kalm", 0)


def test_the_page_names_the_seconds_of_a_start() -> None:
    assert f"{gpus.FIRST_START:g} s for a start that loads the model" in PAGE
    assert f"{gpus.SNAPSHOT_START:g} s for a start from a snapshot" in PAGE


def one(gpu: str) -> Choice:
    (choice,) = choices([gpu], "none")
    return choice


def test_the_readme_has_the_prices_of_the_default() -> None:
    default = DeploySettings()
    assert (default.gpu, default.quantization) == (("A100-40GB",), "none")
    readme = " ".join((ROOT / "README.md").read_text().split())
    up = uptime(72, default.scaledown_window, gpus.SNAPSHOT_START)
    day = DAY * one("A100-40GB").dollars
    cost, waiting = f"${up.share * day:.0f}", f"{100 * up.waiting:.0f} %"
    assert f"cost about {cost} a day (calculated), and {waiting} of them wait" in readme
    assert f"**A cold start** takes about {gpus.SNAPSHOT_START:.0f} s" in readme
    assert f"(`--min-containers 1`), a day costs ${day:.0f}." in readme
    assert f"three an hour cost about {cost} a day |" in readme
    million = 1e6 * one("H100").dollars / one("H100").rate.tokens
    assert f"about ${million:.2f} a million tokens" in readme


def test_the_h100_is_the_cheapest_measured_gpu_for_a_corpus_in_bf16() -> None:
    measured = [c for c in choices(quantization="none") if not c.problem and c.rate.measured]
    assert min(measured, key=lambda c: c.dollars / c.rate.tokens).gpu == "H100"
