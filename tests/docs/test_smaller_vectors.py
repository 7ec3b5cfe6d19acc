"""docs/smaller-vectors.md: its table is what the benchmark measures, and its command runs."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from kalm_integrations.bulk import read
from kalm_integrations.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/smaller-vectors.md").read_text()


def test_the_table_is_what_the_benchmark_measures() -> None:
    section = PAGE.split("| vectors | recall@1")[1].split("\n\n")[0].splitlines()[2:]
    documented = [[cell.strip() for cell in line.strip("|").split("|")] for line in section]
    measured = runpy.run_path(str(ROOT / "benchmarks/smaller_vectors.py"))["measured"]()
    assert [name for name, *_ in documented] == list(measured)
    for (name, *figures), exact in zip(documented, measured.values(), strict=True):
        assert [float(figure) for figure in figures] == pytest.approx(exact, abs=0.03), name


def test_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KALM_BACKEND", "local")
    Path("corpus.jsonl").write_text(json.dumps({"text": "a text"}))
    (command,) = re.findall(r"^kalm (embed .*)$", PAGE, re.MULTILINE)
    assert main(shlex.split(command)) == 0
    (rows,) = read("out")
    assert rows.int8 is not None
    assert rows.int8.shape == rows.vectors.shape
    assert main([*shlex.split(command), "--on", "modal"]) == 2
