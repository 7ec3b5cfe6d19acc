"""`kalm embed` about Modal: what goes with what, and what a dry run says. Asks nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_integrations import KalmClient, cli
from kalm_integrations.bulk import shards
from kalm_integrations.bulk.manifest import Job
from kalm_integrations.bulk.on_modal import command as modal_command
from kalm_integrations.bulk.on_modal import records as job_state
from kalm_integrations.bulk.on_modal import worker_pool
from kalm_integrations.bulk.on_modal.remote import RemoteInput
from kalm_integrations.bulk.options import Options
from kalm_integrations.bulk.parts import Part
from kalm_integrations.bulk.plan import Plan, make_plan
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.readers.source import Source
from modal_backend import gpus
from modal_backend.costs import choices

JOB = "embed-0123456789abcdef"
IDENTITY = KalmClient(backend="local").vector_identity.to_dict()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("in.jsonl --output o --detach", "--detach is for --on modal"),
        ("in.jsonl --output o --max-containers 2", "--max-containers is for --on modal"),
        ("modal://b/x --output o", "modal://b/x can be read with --on modal only"),
        ("in.jsonl --output o --on modal --backend local", "does not go with --backend local"),
        ("in.jsonl --output o --on modal --gpu H100", "--gpu goes with --dry-run"),
        ("in.jsonl --on modal", "--output is missing"),
        ("in.jsonl --output=", "--output is missing"),
        ("in.jsonl --on modal --output o --bucket-secret s", "--bucket-secret is for s3://"),
        ("modal://v/x --on modal --dry-run", "--dry-run does not go with modal://v/x"),
        ("in.jsonl --on modal --dry-run --detach", "--dry-run does not go with --detach"),
        ("modal://v --on modal --output o", "is not like modal://VOLUME/path"),
        ("s3://b/../c --on modal --output o", "is not like modal://VOLUME/path"),
        (f"--status {JOB} --output o", "--status does not go with --output"),
        (f"--status {JOB} --cancel {JOB}", "does not go with"),
        (f"--cancel {JOB} in.jsonl", "--cancel does not go with INPUT"),
        (f"--fetch {JOB}", "--fetch needs --output"),
        ("--output o", "INPUT is missing"),
        ("--status nothing-of-ours", "is neither a job's name"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    command: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr("kalm_integrations.bulk.on_modal.cloud.find", lambda _: None)
    assert cli.main(["embed", *command.split()]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_dry_run_says_what_containers_would_take(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {n} " * 400}) + "\n" for n in range(64)))
    command = ["embed", str(source), "--on", "modal", "--dry-run", "--shard-rows", "8"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "on Modal, on A100-40GB (" in shown
    assert [line.split()[0] for line in shown.splitlines()[-4:]] == ["containers", "1", "4", "8"]
    assert cli.main([*command, "--gpu", "H100", "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    one, four, eight = said["on_modal"]
    assert [row["containers"] for row in (one, four, eight)] == [1, 4, 8]  # no more than shards
    assert one["hours"] > four["hours"] > eight["hours"]
    assert one["dollars"] < four["dollars"] < eight["dollars"]
    assert said["gpu"] == "H100"
    # Every container of the first wave loads the model, and waits at its end.
    (gpu,) = choices(["H100"], "none")
    load = gpus.FIRST_START + worker_pool.SCALEDOWN_WINDOW
    assert four["dollars"] - one["dollars"] == pytest.approx(3 * load * gpu.dollars)
    assert eight["hours"] > gpus.FIRST_START / 3600


VALUES = st.one_of(
    st.none(), st.text(max_size=6), st.integers(-3, 3), st.booleans(), st.lists(st.text(max_size=2))
)


def planned(source: Path, options: Options) -> tuple[Plan, Job]:
    plan = make_plan(Source(str(source)), "error", options, lambda _: None)
    return plan, plan.job(IDENTITY, "float16")


@given(rows=st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=25), size=st.integers(1, 7))
def test_parts_have_every_row_once_with_its_text_or_its_reason(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, Any]], size: int
) -> None:
    good = [isinstance(text, str) and bool(text.strip()) for text, _ in rows]
    folder = tmp_path_factory.mktemp("parts")
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps({"text": t, "more": m}) + "\n" for t, m in rows))
    options = Options(shard_rows=size, on_error="null")
    if not any(good):
        return
    plan, job = planned(source, options)
    row = 0
    for part in plan.parts():
        path = folder / shards.name_of(part.number)
        _, digest = part.write(path)
        read = Part.read(path, part.number, job, digest)
        assert read.places == part.places
        assert read.reasons == part.reasons
        assert read.columns.equals(part.columns)
        assert list(read.first >= 0) == list(part.first >= 0)
        for n, place in enumerate(read.places):
            assert place == f"in.jsonl line {row + 1}"
            assert (n in read.reasons) == (not good[row])
            assert not good[row] or read.texts[n] == rows[row][0]
            row += 1
        assert (part.tokens > 0) == any(n not in read.reasons for n in range(len(read)))
    assert row == len(rows)


def test_columns_with_our_names_are_refused(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "kalm:place": ["b"]})
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(ConfigurationError, match="'kalm:place'"):
        planned(tmp_path / "in.parquet", Options())


def test_a_job_s_name_follows_from_what_decides_its_output(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "in.jsonl").write_text('{"text": "a"}\n')

    def name(where: str = "in.jsonl", **changed: Any) -> str:
        _, job = planned(tmp_path / where, Options(**changed))
        return job_state.job_name(job.model_dump())

    assert job_state.is_job_name(name())
    assert name() == name("elsewhere/in.jsonl") == name(dollars_per_second=1.0)
    assert len({name(), name(shard_rows=5), name(on_error="skip"), name(id_column="text")}) == 4
    addresses = [RemoteInput.parse(f"s3://b/{path}", None) for path in ("x", "/x/", "y")]
    assert [remote and remote.address for remote in addresses] == ["s3://b/x"] * 2 + ["s3://b/y"]


def test_a_folder_belongs_to_one_job(tmp_path: Path) -> None:
    modal_command.claim(tmp_path / "out", JOB, None)
    modal_command.claim(tmp_path / "out", JOB, None)
    assert modal_command.job_named(str(tmp_path / "out")) == JOB
    with pytest.raises(ConfigurationError, match=f"holds {JOB}"):
        modal_command.claim(tmp_path / "out", "embed-ffffffffffffffff", None)
    (tmp_path / "of somebody" / "shards").mkdir(parents=True)
    (tmp_path / "of somebody" / "shards" / "part-000000.parquet").touch()
    with pytest.raises(ConfigurationError, match="shards of another job"):
        modal_command.claim(tmp_path / "of somebody", JOB, None)
