"""`kalm cost`: what it prints, as text and as JSON, and what it refuses."""

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
from modal_backend.costs import API_PRICES, choices, uptime

Cost = Callable[..., str]


@pytest.fixture
def cost(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cost:
    monkeypatch.setenv("COLUMNS", "100")

    def cost(*arguments: str | Path) -> str:
        capfd.readouterr()
        assert main(["cost", *map(str, arguments)]) == 0
        shown, errors = capfd.readouterr()
        assert errors == ""
        return shown

    return cost


def row(shown: str, gpu: str, kind: str, table: int = 0) -> list[str]:
    """The cells after GPU and type."""
    return re.findall(rf"^{gpu} +{kind} (.+)$", shown, re.MULTILINE)[table].split()


def document(cost: Cost, *arguments: str | Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(cost(*arguments, "--json"))
    return made


def of(made: dict[str, Any], gpu: str, quantization: str = "none") -> dict[str, Any]:
    (found,) = [
        choice
        for choice in made["choices"]
        if (choice["gpu"], choice["quantization"]) == (gpu, quantization)
    ]
    return dict(found)


class TestTable:
    def test_measured_and_calculated_are_kept_apart(self, cost: Cost) -> None:
        shown = cost()
        for choice in choices():
            if choice.problem:
                continue
            kind = "bf16" if choice.quantization == "none" else "fp8"
            speed, full, busy = row(shown, choice.gpu, kind)[3:6]
            calculated = [cell[0] == "~" for cell in (speed, full, busy)]
            assert calculated == [not choice.rate.measured] * 3
            assert speed.strip("~") == f"{round(choice.rate.tokens, -2):,.0f}"
        # Each under a head of its own.
        lines = shown.splitlines()
        head = next(line for line in lines if "always busy" in line)
        for gpu, column in (("H100", "measured"), ("L40S", "calculated")):
            line = next(line for line in lines if re.match(rf"{gpu} +bf16", line))
            assert re.search(r"[\d,]+$", line[: head.index(column) + len(column)])
            assert len(re.findall(r"\d,\d{3}", line)) == 1

    def test_it_says_where_figures_are_from(self, cost: Cost) -> None:
        shown = " ".join(cost().split())
        assert "~ is calculated, and not measured on that card" in shown
        for made in gpus.MEASURED:
            assert f"Measured: {made.source}." in shown
        assert f"steps of {gpus.step_tokens():,} tokens" in shown
        assert "Modal's list prices of November 2026" in shown
        assert "nobody has measured" in shown

    def test_what_does_not_run_is_listed_with_the_reason(self, cost: Cost) -> None:
        shown = cost()
        table, _, impossible = shown.partition("Not possible:\n")
        assert "- A100-40GB in fp8 does not compute in fp8 and would give other vectors" in shown
        assert re.search(r"- L4 in bf16 has 24 GiB; weights, .* take \d\d\n", impossible)
        for choice in choices():
            kind = "bf16" if choice.quantization == "none" else "fp8"
            missing = re.search(rf"^{choice.gpu} +{kind} ", table, re.MULTILINE) is None
            assert missing == bool(choice.problem)
            assert (f"- {choice.gpu} in {kind} {choice.problem}\n" in impossible) == missing

    def test_filters(self, cost: Cost) -> None:
        shown = cost("--gpu", "L40S, H100!", "--quantization", "fp8")
        assert re.findall(r"^(\S+) +(?:bf16|fp8) ", shown, re.MULTILINE) == ["L40S", "H100"]
        assert "Not possible" not in shown
        assert "bf16, " not in shown

    def test_only_measured_ones_have_nothing_to_mark_but_the_query(self, cost: Cost) -> None:
        assert "~ is calculated" not in cost("--gpu", "H100")

    def test_nothing_that_runs(self, cost: Cost) -> None:
        shown = cost("--gpu", "A10", "--tokens", "1M", "--queries-per-day", "5")
        assert "Not possible:\n- A10 in bf16" in shown
        assert "$" not in shown.partition("\n\n")[2]

    def test_a_utilization_of_ones_own(self, cost: Cost) -> None:
        full, quarter = row(cost("--gpu", "H100", "--utilization", "0.25"), "H100", "bf16")[4:6]
        assert float(quarter) == pytest.approx(4 * float(full), rel=0.02)
        assert "25% busy" in cost("--utilization", "0.25")

    def test_the_width_is_a_terminals(self, cost: Cost, monkeypatch: pytest.MonkeyPatch) -> None:
        arguments = ("--tokens", "2B", "--queries-per-day", "30M")
        wide = cost(*arguments)
        for columns in (60, 80, 100):
            monkeypatch.setenv("COLUMNS", str(columns))
            shown = cost(*arguments)
            assert max(map(len, shown.splitlines())) <= columns
            # Nothing is left out: a table that is too wide goes on below, with its names again.
            assert set(re.findall(r"~?[\d.,]+", shown)) == set(re.findall(r"~?[\d.,]+", wide))
            assert "\n- L4 in bf16 has 24 GiB; weights, KV cache and" in shown
            bullets = shown.partition("Not possible:\n")[2].splitlines()
            assert {line[:2] for line in bullets} <= {"- ", "  "}  # what goes on hangs
            assert ("  " in {line[:2] for line in bullets}) == (columns < 80)

    def test_it_needs_nothing_beyond_the_core(self) -> None:
        code = (
            "import sys\nfor name in ('modal', 'vllm', 'torch'): sys.modules[name] = None\n"
            "from kalm_integrations.cli import main; sys.exit(main(['cost', '--tokens', '1M']))"
        )
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")


class TestCorpus:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("--tokens", "500M"),
            ("--tokens", "500_000_000"),
            ("--tokens", "0.5B"),
            ("--texts", "2,500k", "--tokens-per-text", "200"),
        ],
    )
    def test_a_number_of_tokens(self, cost: Cost, arguments: tuple[str, ...]) -> None:
        assert "Your corpus: 500,000,000 tokens (" in cost(*arguments)
        made = document(cost, *arguments)
        assert made["corpus"]["tokens"] == 500_000_000
        found = of(made, "H100")
        seconds = 500e6 / gpus.rate("H100", "none").tokens + gpus.cold_start("none")
        assert found["corpus"]["hours"] == pytest.approx(seconds / 3600, rel=1e-4)
        dollars = (seconds + 300) * gpus.container_dollars(["H100"], "none")
        assert found["corpus"]["dollars"] == pytest.approx(dollars, rel=1e-4)

    def test_marks_and_prices_of_apis(self, cost: Cost) -> None:
        shown = cost("--tokens", "1B")
        assert all(cell[0] == "~" for cell in row(shown, "L40S", "bf16", 1))
        assert not any(cell[0] == "~" for cell in row(shown, "H100", "bf16", 1))
        for name, price in API_PRICES.items():
            assert re.search(rf"^{name} +{1000 * price:.2f}$", shown, re.MULTILINE)
        assert "November 2026, second-hand" in " ".join(shown.split())

    def test_files_are_counted_as_requests_are_planned(self, cost: Cost, tmp_path: Path) -> None:
        texts = {
            "a.md": "An English text.\n" * 100,
            "b/c.txt": "维基百科是一个自由的百科全书。" * 50,
        }
        for name, text in texts.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text, "utf-8")
        (tmp_path / "picture.png").write_bytes(b"\xff" * 1000)
        (tmp_path / ".hidden.md").write_text("hidden " * 1000)
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 1000)
        (tmp_path / "empty.md").touch()
        tokens = sum(estimate_tokens(len(text.encode())) for text in texts.values())
        made = document(cost, "--corpus", tmp_path)
        assert made["corpus"]["tokens"] == tokens
        assert "latin.txt (not UTF-8)" in made["corpus"]["origin"]
        one = document(cost, "--corpus", tmp_path / "a.md")["corpus"]
        assert one["tokens"] == estimate_tokens(1700)
        assert "1 file of" in one["origin"]

    def test_of_json_lines_the_texts_are_counted_and_not_their_syntax(
        self, cost: Cost, tmp_path: Path
    ) -> None:
        texts = ["An English text. " * 9, "维基百科" * 50, "caf\u00e9", "\ud800"]
        path = tmp_path / "corpus.jsonl"
        for column, arguments in (("text", []), ("body", ["--text-column", "body"])):
            lines = [json.dumps({"id": 10**40, column: text}) for text in texts]
            path.write_text("\n".join([*lines, "", "  "]))
            made = document(cost, "--corpus", path, *arguments)["corpus"]
            sizes = [len(text.encode(errors="surrogatepass")) for text in texts]
            assert made["tokens"] == sum(map(estimate_tokens, sizes))
            assert f"'{column}' of 4 lines of {path}" in made["origin"]

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ('{"body": "x"}', "line 2 has no 'text', but 'body': --text-column names the text"),
            ('{"text": 7}', "line 2: 'text' is no text, but int"),
            ("[]", "line 2 is no JSON object, but list"),
            ("{", "line 2 is not JSON"),
        ],
    )
    def test_a_line_without_a_text_is_named(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str], line: str, said: str
    ) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line)
        assert main(["cost", "--corpus", str(tmp_path / "a.jsonl")]) == 2
        assert f"a.jsonl {said}" in capfd.readouterr().err

    def test_parquet_is_counted_by_the_command_that_reads_it(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "a.parquet").touch()
        assert main(["cost", "--corpus", str(tmp_path / "a.parquet")]) == 2
        assert "a.parquet --dry-run --gpu GPU`" in capfd.readouterr().err

    def test_that_markup_is_counted_is_said(self, cost: Cost, tmp_path: Path) -> None:
        for name, counted in (("a.csv", True), ("a.md", False)):
            (tmp_path / name).write_text("a,b,c\n" * 9)
            origin = document(cost, "--corpus", tmp_path / name)["corpus"]["origin"]
            assert origin.endswith(", markup and all") == counted

    def test_a_character_across_two_pieces_is_text(
        self, cost: Cost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kalm_integrations.cost.corpus._PIECE", 4)
        (tmp_path / "a.log").write_text("百科全书" * 10, "utf-8")
        made = document(cost, "--corpus", tmp_path / "a.log")
        assert made["corpus"]["tokens"] == estimate_tokens(120)
        (tmp_path / "a.log").write_bytes("百科全书".encode()[:-1])
        assert main(["cost", "--corpus", str(tmp_path / "a.log")]) == 2


class TestTraffic:
    def test_it_is_the_formulas(self, cost: Cost) -> None:
        made = document(cost, "--queries-per-day", "200", "--cold-start", "30")
        up = uptime(200, 300, 30)
        found = of(made, "A100-40GB")["traffic"]
        assert found["hours_up_per_day"] == pytest.approx(24 * up.share, rel=1e-4)
        assert found["cold_starts_per_day"] == pytest.approx(up.starts, rel=1e-4)
        assert found["queries_waiting"] == pytest.approx(up.waiting, rel=1e-4)
        hour = of(made, "A100-40GB")["dollars_per_hour"]
        assert found["dollars_per_month"] == pytest.approx(720 * hour * up.share, rel=1e-4)
        assert found["always_on_dollars_per_month"] == pytest.approx(720 * hour, rel=1e-4)
        starts = found["cold_start_dollars_per_month"]
        assert starts == pytest.approx(30 * up.starts * 30 / 3600 * hour, rel=1e-4)

    def test_text_shows_the_same_and_marks_it(self, cost: Cost) -> None:
        arguments = ("--queries-per-day", "200", "--gpu", "H100")
        shown = cost(*arguments)
        found = of(document(cost, *arguments), "H100")["traffic"]
        *cells, always = row(shown, "H100", "bf16", 1)
        assert all(cell[0] == "~" for cell in cells)
        assert cells[0] == f"~{found['hours_up_per_day']:.1f}"
        assert cells[-1] == f"~{found['dollars_per_month']:,.2f}"
        assert always == f"{found['always_on_dollars_per_month']:,.2f}"
        assert "evenly spread (Poisson)" in shown
        assert "All of it is calculated." in " ".join(shown.split())

    def test_the_window_and_the_start_are_ones_own(self, cost: Cost) -> None:
        window = "--scaledown-window"

        def hours(*arguments: str) -> float:
            made = document(cost, "--queries-per-day", "100", *arguments)
            assert made["scaledown_window"] == int(dict([arguments[-2:]]).get(window, 300))
            return float(of(made, "H100")["traffic"]["hours_up_per_day"])

        assert hours(window, "60") < hours("--gpu", "H100") < hours(window, "600")
        assert hours("--cold-start", "1") < hours("--cold-start", "90")

    def test_more_than_one_container_can_do_is_said(self, cost: Cost) -> None:
        assert "too few" not in cost("--queries-per-day", "1M")
        shown = cost("--queries-per-day", "30M")
        assert re.search(r"! L40S in bf16 embeds about [\d,]+ short queries a day: too few", shown)
        assert "H100 in fp8 embeds" not in shown


class TestJson:
    def test_it_is_one_document_with_all_of_it(self, cost: Cost) -> None:
        made = document(cost)
        assert len(made["choices"]) == 2 * len(gpus.GPUS)
        assert (made["corpus"], made["queries_per_day"]) == (None, None)
        assert made["step_tokens"] == gpus.step_tokens()
        assert len(made["measured"]) == len(gpus.MEASURED)
        for found in made["choices"]:
            if found["problem"]:
                assert "tokens_per_second" not in found
                continue
            rate = gpus.rate(found["gpu"], found["quantization"])
            assert (found["measured"], found["source"]) == (rate.measured, rate.source)
            million = found["dollars_per_hour"] / 3600 / found["tokens_per_second"] * 1e6
            assert found["dollars_per_million"] == pytest.approx(million, rel=1e-3)
            assert not {"corpus", "traffic"} & found.keys()

    def test_filters(self, cost: Cost) -> None:
        made = document(cost, "--gpu", "L4", "--quantization", "fp8")
        assert [(c["gpu"], c["quantization"]) for c in made["choices"]] == [("L4", "fp8")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "H100,h20"], r"--gpu='h20': there is no such GPU\. Did you mean H200\? There "),
        (["--gpu", ","], "it names none"),
        (["--quantization", "int8"], '"int8" for --quantization'),
        (
            ["--tokens", "0"],
            "'0' is not a whole number from 1 to 1,000,000,000,000,000, like 500000",
        ),
        (["--tokens", "-5"], "'-5' is not a whole number"),
        (["--tokens", "many"], "'many' is not a whole number"),
        (["--tokens", "nan"], "'nan' is not a whole number"),
        (["--tokens", "9" * 400], "is not a whole number from 1 to"),
        (["--tokens", "1.5"], "'1.5' is not a whole number"),
        (["--tokens", "1", "--corpus", "."], "--corpus does not go with --tokens"),
        (["--texts", "5"], "--texts and --tokens-per-text go together"),
        (["--tokens-per-text", "5"], "--texts and --tokens-per-text go together"),
        (["--corpus", "no-such-folder"], "there is no no-such-folder"),
        (["--queries-per-day", "0"], "'0' is not a whole number from 1 to"),
        (["--queries-per-day", "-1"], "'-1' is not a whole number"),
        (["--utilization", "0"], "<= 1"),
        (["--utilization", "60"], "<= 1"),
        (["--utilization", "nan"], "<= 1"),
        (["--scaledown-window", "60"], "--scaledown-window is for --queries-per-day, or for a"),
        (["--queries-per-day", "5", "--cold-start", "3601"], "<= 3600"),
        (["--text-column", "body"], "--text-column is for JSON Lines"),
        (["--corpus", ".", "--text-column", "body"], "--text-column is for JSON Lines"),
        (["--cold-start", "60"], "--cold-start is for --queries-per-day, or for a corpus"),
        (
            ["--queries-per-day", "5", "--scaledown-window", "7200"],
            "<= 3600",
        ),
    ],
)
def test_nonsense_is_refused_with_status_2(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    status = main(["cost", *arguments])
    shown, errors = capfd.readouterr()
    assert (status, shown) == (2, "")
    assert re.search(said, errors), errors


def test_a_corpus_without_text_says_what_to_give_instead(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "a.bin"):
        assert main(["cost", "--corpus", str(path)]) == 2
        assert "has no text" in (said := capfd.readouterr().err)
        assert "--texts and --tokens-per-text" in said


def test_parquet_is_counted_by_the_dry_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (path := tmp_path / "a.parquet").write_bytes(b"PAR1\xff\xfe")
    assert main(["cost", "--corpus", str(path)]) == 2
    assert f"`kalm embed {path} --dry-run --gpu GPU`" in capfd.readouterr().err
