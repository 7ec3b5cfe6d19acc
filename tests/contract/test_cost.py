"""`kalm cost`: figures of its table and its JSON document, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kalm_integrations.batching import estimate_tokens
from kalm_integrations.cli import main
from modal_backend import gpus
from modal_backend.costs import choices, uptime

Report = Callable[..., dict[str, Any]]


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    def report(*arguments: str | Path) -> dict[str, Any]:
        assert main(["cost", *map(str, arguments), "--json"]) == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    return report


def row(document: dict[str, Any], gpu: str, quantization: str = "none") -> dict[str, Any]:
    (match,) = (
        row
        for row in document["choices"]
        if (row["gpu"], row["quantization"]) == (gpu, quantization)
    )
    return dict(match)


def test_each_gpu_has_its_price_and_whether_its_throughput_was_measured(report: Report) -> None:
    document = report("--utilization", "0.25")
    assert len(document["choices"]) == 3 * len(gpus.GPUS)
    for choice in choices():
        found = row(document, choice.gpu, choice.quantization)
        assert found["problem"] == (choice.problem or None)
        if choice.problem:
            assert "tokens_per_second" not in found
            continue
        assert found["basis"] == ("measured" if choice.rate.measured else "calculated")
        million = found["dollars_per_hour"] / 3600 / found["tokens_per_second"] * 1e6
        assert found["dollars_per_million"] == pytest.approx(million, rel=1e-3)
        assert found["dollars_per_million_at_utilization"] == pytest.approx(4 * million, rel=1e-3)
        assert "corpus_hours" not in found
        assert "dollars_per_month" not in found


def test_every_assumption_has_a_basis_and_a_source(report: Report) -> None:
    assumptions = report()["assumptions"]
    assert {each["basis"] for each in assumptions} == {"measured", "listed", "calculated"}
    sources = {each["source"] for each in assumptions}
    assert {rate.source for rate in gpus.MEASURED.values()} <= sources
    assert all(each["figure"] and each["source"] for each in assumptions)
    given = report("--tokens", "1M", "--cold-start", "30")["assumptions"]
    assert [each["source"] for each in given if each["basis"] == "given"] == ["--cold-start"]


def test_the_table_has_the_figures_of_the_document(
    report: Report, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--gpu", "L40S,A10", "--tokens", "500M", "--queries-per-day", "200"]
    found = row(report(*arguments), "L40S")
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["cost", *arguments]) == 0
    lines = re.findall(r"^L40S +bf16 +(.+)$", capsys.readouterr().out, re.MULTILINE)
    prices, corpus, traffic = (line.split() for line in lines)
    assert prices[1:3] == [f"{found['tokens_per_second']:,.0f}", "calculated"]
    assert corpus == [f"{found['corpus_hours']:.1f}", f"{found['corpus_dollars']:.2f}"]
    assert traffic[2] == f"{found['dollars_per_month']:,.0f}"


def test_only_named_gpus_and_quantizations_are_shown(report: Report) -> None:
    document = report("--gpu", "L40S, H100!", "--quantization", "fp8")
    pairs = [(each["gpu"], each["quantization"]) for each in document["choices"]]
    assert pairs == [("L40S", "fp8"), ("H100", "fp8")]


@pytest.mark.parametrize("tokens", ["500M", "500_000_000", "500,000k", "0.5B"])
def test_a_corpus_costs_a_load_its_tokens_and_the_idle_window(report: Report, tokens: str) -> None:
    document = report("--tokens", tokens)
    assert document["tokens"] == 500_000_000
    found = row(document, "H100")
    seconds = gpus.FIRST_START + 500e6 / gpus.rate("H100", "none").tokens
    assert found["corpus_hours"] == pytest.approx(seconds / 3600, rel=1e-4)
    dollars = (seconds + 300) * gpus.container_dollars(["H100"], "none")
    assert found["corpus_dollars"] == pytest.approx(dollars, rel=1e-4)


def test_a_corpus_is_counted_as_bulk_jobs_count_it(report: Report, tmp_path: Path) -> None:
    texts = ["An English text. " * 9, "维基百科" * 50, "An English text. " * 9]
    path = tmp_path / "corpus.jsonl"
    no_texts = [None, 7, " "]  # which a job would skip
    path.write_text("".join(json.dumps({"body": t}) + "\n" for t in [*texts, *no_texts]))
    tokens = sum(estimate_tokens(len(text.encode())) for text in texts[:2])
    assert report("--corpus", path, "--text-column", "body")["tokens"] == tokens


@pytest.mark.parametrize("start", [None, 30])
def test_traffic_follows_the_formulas(report: Report, start: int | None) -> None:
    given = [] if start is None else ["--cold-start", str(start)]
    document = report("--queries-per-day", "200", "--scaledown-window", "60", *given)
    up = uptime(200, 60, start or gpus.SNAPSHOT_START)
    found = row(document, "A100-40GB")
    assert found["hours_up_per_day"] == pytest.approx(24 * up.share, rel=1e-4)
    assert found["queries_waiting"] == pytest.approx(up.waiting, rel=1e-4)
    month = 720 * found["dollars_per_hour"]
    assert found["always_on_dollars_per_month"] == pytest.approx(month, rel=1e-4)
    assert found["dollars_per_month"] == pytest.approx(up.share * month, rel=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gpu", "H100,h20"],
        ["--gpu", ","],
        ["--quantization", "int4"],
        ["--tokens", "0"],
        ["--tokens", "1.5"],
        ["--tokens", "many"],
        ["--tokens", "5", "--corpus", "."],
        ["--queries-per-day", "-1"],
        ["--utilization", "0"],
        ["--utilization", "nan"],
        ["--scaledown-window", "60"],
        ["--cold-start", "60"],
        ["--queries-per-day", "5", "--cold-start", "3601"],
        ["--queries-per-day", "5", "--scaledown-window", "7200"],
        ["--text-column", "body"],
    ],
)
def test_arguments_that_cannot_work_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cost", *arguments]) == 2
    shown, errors = capsys.readouterr()
    assert shown == ""
    assert arguments[0 if "--corpus" in arguments else -2] in errors


@pytest.mark.parametrize("content", [b"", b"\xff\xfe"])
def test_a_corpus_without_text_is_refused(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert main(["cost", "--corpus", str(tmp_path / "a.txt")]) == 2
    assert "a.txt" in capsys.readouterr().err


@pytest.mark.slow
def test_it_needs_neither_modal_nor_an_engine() -> None:
    code = (
        "import sys\nfor name in ('modal', 'pyarrow', 'vllm'): sys.modules[name] = None\n"
        "from kalm_integrations.cli import main; sys.exit(main(['cost', '--tokens', '1M']))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
