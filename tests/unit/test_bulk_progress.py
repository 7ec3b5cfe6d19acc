"""What people see of a job: a bar on a terminal, lines elsewhere, nothing flooded."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest

from kalm_integrations import KalmClient
from kalm_integrations.bulk import progress as progress_module
from kalm_integrations.bulk.job import embed_corpus
from kalm_integrations.bulk.options import Options
from kalm_integrations.bulk.progress import ProgressView, duration

log = logging.getLogger("kalm_integrations.session")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What stderr gets of a job of 40 rows, 4 of them bad, that `warns` so many times."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"text": "{"" if n % 10 == 0 else n}"}}\n' for n in range(40)))

    def run(stream: io.StringIO, warns: int = 0, every: float = 0.0) -> str:
        monkeypatch.setattr(progress_module.sys, "stderr", stream)
        monkeypatch.setattr(progress_module, "_EVERY", every)

        class Watched(ProgressView):
            def begun(self, *arguments: Any) -> None:
                super().begun(*arguments)
                for _ in range(warns):
                    log.warning("the service serves no requests, which are retried: gone")

        progress = Watched(dollars_per_second=3600.0)
        options = Options(on_error="skip", shard_rows=8)
        with KalmClient(backend="local", batch_size=4) as client:
            embed_corpus(source, tmp_path / "out", client, options, progress)
        progress.close()
        log.warning("after the job")
        return stream.getvalue()

    return run


def test_lines_say_rows_rates_cost_and_what_is_left(shown: Any) -> None:
    first, *lines = shown(io.StringIO()).splitlines()
    assert first == "kalm embed: reading: 40 rows"
    assert lines[0] == ("kalm embed: 40 rows; 36 texts, about 36 tokens; 4 cannot be embedded")
    for part in ("36 of 36 rows", "rows/s", "tokens/s", "$", "so far", "$0.00 to come", "0 s left"):
        assert part in lines[-1]


def test_without_a_terminal_a_short_job_says_nothing_on_its_way(shown: Any) -> None:
    assert len(shown(io.StringIO(), every=60.0).splitlines()) == 1


def test_on_a_terminal_there_is_a_bar_with_rates_and_cost(shown: Any) -> None:
    said = shown(Terminal())
    assert "Embedding" in said
    assert "/36" in said
    assert "tokens/s" in said
    assert "so far" in said


def test_the_clients_warnings_are_shown_while_the_job_runs(shown: Any) -> None:
    said = shown(Terminal(), warns=30, every=60.0)
    assert said.count("kalm embed: the service serves no requests") == 1
    assert "after the job" not in said


def test_the_same_warning_is_shown_again_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = iter([0.0, 30.0, 40.0, 61.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    handler = progress_module._Warnings(said.append)
    for text in ("outage", "outage", "unverified", "outage"):
        handler.emit(logging.makeLogRecord({"msg": text}))
    assert said == ["outage", "unverified", "outage"]
    assert handler.seen == 4


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (7500, "2 h 5 min")]
)
def test_durations_in_words(seconds: float, said: str) -> None:
    assert duration(seconds) == said
