"""Bulk jobs on Modal: real client, real container runtime, real engine; killed in every way.

Each time the output has to be a local run's: rows, columns, vectors, bit by bit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import modal
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from modal_emulator import Emulator

from kalm_integrations import KalmClient, cli
from kalm_integrations.bulk import Options, embed_corpus, read
from kalm_integrations.bulk.manifest import Manifest
from kalm_integrations.bulk.on_modal import transfer
from kalm_integrations.bulk.on_modal.cloud import VolumeStore
from kalm_integrations.models import EMBEDDED

ROOT = Path(__file__).parents[2]
FAULTY_APP = Path(__file__).parent / "apps" / "faulty_app.py"
REAL, FAULTY = "vllm-embedding-snapshot", "faulty"
POOL = "VLLMBulkEmbedding"
SHARD = 50
KALM = [sys.executable, "-m", "kalm_integrations.cli", "embed"]


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for which slow texts wait."""
    return tmp_path_factory.mktemp("gate") / "open"


@pytest.fixture(scope="module")
def emulator(new_emulator: Callable[..., Emulator], gate: Path) -> Iterator[Emulator]:
    """The app, and one whose engine does what texts say; this process's variables point there."""
    emulator = new_emulator(container_env={"FAULT": "texts", "GATE": str(gate)})
    variables = {"KALM_DEPLOY_ENGINE": "embedded"}
    emulator.deploy("modal_backend.app", cwd=ROOT, env=variables)
    emulator.deploy(FAULTY_APP, cwd=ROOT, env={**variables, "KALM_DEPLOY_APP_NAME": FAULTY})
    with pytest.MonkeyPatch.context() as patch, emulator.in_this_process(patch):
        yield emulator
    assert not emulator.unimplemented


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALM_MODEL", EMBEDDED.space.model)


@pytest.fixture
def faulty(emulator: Emulator, gate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """Jobs go to the faulty app, whose gate is closed until the test opens it, or ends."""
    monkeypatch.setenv("KALM_APP_NAME", FAULTY)
    gate.unlink(missing_ok=True)
    yield emulator
    gate.touch()


@pytest.fixture
def kalm(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """`kalm embed ...` in this process: what it printed, and what it said beside that."""

    def kalm(*arguments: Any, status: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        ended = cli.main(["embed", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert ended == status, out + err
        return out, err

    return kalm


def corpus(path: Path, rows: int = 400, seed: int = 0, **special: str) -> Path:
    """JSON Lines, each text twice within a shard; `special` ones by row ("r7").

    Copies far away would be embedded once by a local run, and once a shard here: in another batch,
    of which the engine's last bits depend.
    """
    with path.open("w") as file:
        for number in range(rows):
            text = special.get(f"r{number}", f"What is known of {number // 2} in {seed}?")
            file.write(json.dumps({"id": number, "text": text}) + "\n")
    return path


def on_modal(source: Any, out: Path, *more: Any) -> list[Any]:
    """With one container at a time, if nothing else is said: jobs one after another share it."""
    fixed = ["--on", "modal", "--shard-rows", SHARD, "--max-containers", 1]
    return [source, "--output", out, *fixed, *more]


def local(source: Path, out: Path, **options: Any) -> Path:
    with KalmClient(backend="local", model=EMBEDDED.space.model) as client:
        embed_corpus(source, out, client, Options(shard_rows=SHARD, **options))
    return out


def same(out: Path, expected: Path) -> bool:
    """Shards byte by byte, rejected rows, and what the job is."""
    made, wanted = (sorted((f / "shards").iterdir()) for f in (out, expected))
    assert [path.name for path in made] == [path.name for path in wanted]
    assert [
        path.name
        for path, other in zip(made, wanted, strict=True)
        if path.read_bytes() != other.read_bytes()
    ] == []
    found, known = (f / "rejected.parquet" for f in (out, expected))
    assert found.exists() == known.exists()
    assert not known.exists() or pq.read_table(found).equals(pq.read_table(known))
    ours, theirs = Manifest.read(out), Manifest.read(expected)
    assert ours is not None
    assert theirs is not None
    assert ours.complete
    assert {path.name for path in out.rglob(".*")} <= {".lock"}
    return ours.job == theirs.job


def folder(emulator: Emulator, job: str) -> Path:
    return emulator.volume("kalm-bulk") / "jobs" / job


def finished(emulator: Emulator, job: str) -> int:
    found = (folder(emulator, job) / "records").glob("*.json")
    return sum(json.loads(path.read_bytes())["shard"] is not None for path in found)


def sent(kalm: Any, *command: Any) -> str:
    """Send a job and go: its name."""
    return str(kalm(*command, "--detach")[0].strip())


def slow(path: Path, seed: int = 0) -> Path:
    """Eight shards, of which the last four wait for the gate."""
    return corpus(path, seed=seed, **{f"r{n}": f"slow {n}" for n in range(225, 400, 50)})


# -- an undisturbed job ------------------------------------------------------------------------
def test_the_output_is_a_local_run_s_bit_by_bit(
    emulator: Emulator, kalm: Any, tmp_path: Path
) -> None:
    rows = 220
    table = pa.table(
        {
            "n": pa.array(range(rows), pa.int16()),
            "body": [f"text {n // 2}" if n % 13 else None for n in range(rows)],
            "when": pa.array([datetime(2026, 1, 1 + n % 28, tzinfo=UTC) for n in range(rows)]),
            "tags": [["a"] * (n % 3) for n in range(rows)],
            "kind": pa.array([f"k{n % 4}" for n in range(rows)]).dictionary_encode(),
            "nested": [{"x": n, "y": None} for n in range(rows)],
        }
    )
    source = tmp_path / "in.parquet"
    pq.write_table(table, source)
    options = ["--text-column", "body", "--id-column", "n", "--on-error", "null"]
    out, said = kalm(*on_modal(source, tmp_path / "out", "--max-containers", 2, *options))
    expected = local(source, tmp_path / "local", text_column="body", id_column="n", on_error="null")
    assert same(tmp_path / "out", expected)
    assert f"{rows:,} rows in 5 shards" in out
    assert "this terminal may close" in said
    assert len(emulator.containers(f"{REAL}/{POOL}")) <= 2
    # Whoever mounts the Volume finds a finished local job there.
    job = json.loads((tmp_path / "out" / "modal-job.json").read_bytes())["job"]
    there = folder(emulator, job)
    assert [len(rows) for rows in read(there)] == [len(rows) for rows in read(expected)]
    assert pq.read_table(there / "rejected.parquet").num_rows == 17
    # Again: nothing is sent, and a local run has nothing to do either.
    calls = len(list((there / "runs").iterdir()))
    kalm(*on_modal(source, tmp_path / "out", *options))
    assert len(list((there / "runs").iterdir())) == calls == 1
    here = [source, "--output", tmp_path / "out", "--shard-rows", SHARD, *options]
    assert "all done before" in kalm(*here, "--backend", "local")[1]


# -- killed, redeployed, left alone ------------------------------------------------------------
def test_killed_mid_shard_while_the_service_answers_at_once(
    faulty: Emulator, gate: Path, kalm: Any, tmp_path: Path
) -> None:
    source = slow(tmp_path / "in.jsonl")
    job = sent(kalm, *on_modal(source, tmp_path / "out"))
    faulty.wait(lambda: finished(faulty, job) == 4, timeout=60)
    # Shards wait in their own queue, and in their own containers: a query meets none of them.
    with KalmClient(backend="modal", timeout=60) as client:
        client.embed(["a query"], role="query")
    assert faulty.starts(f"{FAULTY}/VLLMEmbeddingSnapshot") == 1
    assert len(faulty.running(f"{FAULTY}/{POOL}")) == 1
    faulty.commit_in_background(f"{FAULTY}/{POOL}")  # as Modal does, at a moment of its choice
    victim = faulty.kill(f"{FAULTY}/{POOL}")
    assert finished(faulty, job) == 4
    gate.touch()
    kalm(*on_modal(source, tmp_path / "out"))
    assert same(tmp_path / "out", local(source, tmp_path / "local"))
    assert len(list((folder(faulty, job) / "runs").iterdir())) == 1  # Modal's own queue went on
    made = [json.loads(p.read_bytes()) for p in sorted((folder(faulty, job) / "records").iterdir())]
    assert [len(record["attempts"]) for record in made] == [1, 1, 1, 1, 2, 2, 1, 1]
    assert made[4]["attempts"][0]["container"] in victim.task_ids
    state = json.loads(kalm("--status", job, "--json")[0])
    assert (state["state"], state["containers"], state["finished"]) == ("complete", 2, 8)
    assert state["dollars"] > 0


def test_redeployed_mid_job(faulty: Emulator, gate: Path, kalm: Any, tmp_path: Path) -> None:
    source = slow(tmp_path / "in.jsonl", seed=1)
    job = sent(kalm, *on_modal(source, tmp_path / "out"))
    faulty.wait(lambda: finished(faulty, job) == 4, timeout=60)
    variables = {"KALM_DEPLOY_ENGINE": "embedded", "KALM_DEPLOY_APP_NAME": FAULTY}
    faulty.deploy(FAULTY_APP, cwd=ROOT, env={**variables, "KALM_DEPLOY_TIMEOUT": "500"})
    assert finished(faulty, job) == 4
    gate.touch()
    kalm(*on_modal(source, tmp_path / "out"))
    assert same(tmp_path / "out", local(source, tmp_path / "local"))


def test_a_laptop_that_dies_costs_nothing(
    faulty: Emulator, gate: Path, kalm: Any, tmp_path: Path
) -> None:
    source, out = slow(tmp_path / "in.jsonl", seed=2), tmp_path / "out"
    words = [*KALM, *map(str, on_modal(source, out))]
    around = {**os.environ, **faulty.client_env}
    with subprocess.Popen(words, env=around, stderr=subprocess.PIPE, text=True) as laptop:
        assert laptop.stderr
        said = next(line for line in laptop.stderr if "is on Modal" in line)
        laptop.send_signal(signal.SIGKILL)
    job = said.split()[2]
    state = json.loads(kalm("--status", out, "--json")[0])
    assert (state["job"], state["state"]) == (job, "running")
    gate.touch()
    faulty.wait((folder(faulty, job) / "manifest.json").exists, timeout=90)
    assert "complete, 8 of 8 shards, 400 rows" in kalm("--status", job)[0]
    other = tmp_path / "another folder"
    shown = json.loads(kalm("--fetch", job, "--output", other, "--json")[0])
    assert shown["complete"]
    assert same(other, local(source, tmp_path / "local"))


def test_two_jobs_at_once_one_cancelled_and_resumed(
    faulty: Emulator, gate: Path, kalm: Any, tmp_path: Path
) -> None:
    sources = [slow(tmp_path / f"{seed}.jsonl", seed=seed) for seed in (3, 4)]
    outs = [tmp_path / "out 3", tmp_path / "out 4"]
    jobs = [
        sent(kalm, *on_modal(source, out, "--max-containers", 4))  # which share the containers
        for source, out in zip(sources, outs, strict=True)
    ]
    assert len(set(jobs)) == 2
    faulty.wait(lambda: all(finished(faulty, job) == 4 for job in jobs), timeout=60)
    assert "runs already" in kalm(*on_modal(sources[0], outs[0], "--detach"))[1]
    assert "stopped" in kalm("--cancel", outs[1])[0]
    stopped = json.loads(kalm("--status", jobs[1], "--json")[0])
    assert (stopped["state"], stopped["stopped"]["reason"]) == ("stopped", "cancelled")
    partly = tmp_path / "partly"
    assert "4 of 8 shards" in kalm("--fetch", jobs[1], "--output", partly)[0]
    assert len(list((partly / "shards").iterdir())) == 4
    faulty.wait(lambda: not cancelled_at_work(faulty), timeout=60)  # Modal tells containers late
    gate.touch()
    kalm(*on_modal(sources[0], outs[0]))
    assert same(outs[0], local(sources[0], tmp_path / "local 3"))
    assert finished(faulty, jobs[1]) == 4  # cancelled is cancelled
    kalm(*on_modal(sources[1], outs[1]))
    assert same(outs[1], local(sources[1], tmp_path / "local 4"))
    assert len(list((folder(faulty, jobs[1]) / "runs").iterdir())) == 2
    refused = kalm("--fetch", jobs[0], "--output", outs[1], status=2)[1]
    assert "holds another job" in refused


def cancelled_at_work(emulator: Emulator) -> bool:
    return any(
        entry.call.cancelled
        for container in emulator.running(f"{FAULTY}/{POOL}")
        for entry, _ in container.pool.running.values()
    )


def test_jobs_of_any_size_share_one_configuration_and_its_snapshots(
    emulator: Emulator, kalm: Any, tmp_path: Path
) -> None:
    base = emulator.function(f"{REAL}/{POOL}")
    for number, (rows, size) in enumerate([(20, 10), (400, 400)], 1):
        source = corpus(tmp_path / f"{number}.jsonl", rows, seed=10 + number)
        more = ["--shard-rows", size, "--max-containers", number]
        kalm(*on_modal(source, tmp_path / f"out {number}", *more))
        functions = emulator.cloud.functions.values()
        assert not [f for f in functions if f.base_id == base.function_id]  # no variant
        (pool,) = {c.pool for c in emulator.containers(f"{REAL}/{POOL}")}
        assert pool.definition.autoscaler_settings.max_containers == number
        assert pool.definition.timeout_secs == base.definition.timeout_secs == 86_400


def end_containers(emulator: Emulator) -> None:
    """So that the next ones are as the options say."""
    while emulator.running(f"{FAULTY}/{POOL}"):
        emulator.kill(f"{FAULTY}/{POOL}")


# -- what fails --------------------------------------------------------------------------------
def test_containers_that_cannot_be_trusted_end_the_job_and_not_the_money(
    faulty: Emulator, kalm: Any, tmp_path: Path
) -> None:
    source, out = corpus(tmp_path / "in.jsonl", seed=5), tmp_path / "out"
    end_containers(faulty)
    before = faulty.starts(f"{FAULTY}/{POOL}")
    with faulty.changed(container_env={"FAULT": "always"}):
        said = kalm(*on_modal(source, out), status=1)[1]
    assert "was stopped (canary): 3 containers could not be trusted" in said
    assert "length 0.5000" in said
    assert faulty.starts(f"{FAULTY}/{POOL}") == before + 3
    kalm(*on_modal(source, out))
    assert same(out, local(source, tmp_path / "local"))


def test_a_poisoned_shard_is_reported_after_the_others_and_tried_again_later(
    faulty: Emulator, kalm: Any, tmp_path: Path
) -> None:
    source, out = corpus(tmp_path / "in.jsonl", seed=6, r120="a poisoned text"), tmp_path / "out"
    said = kalm(*on_modal(source, out), status=1)[1]
    assert "1 shard of embed-" in said
    assert "part-000002.parquet (rows 100 to 149, tried 1 time): bad_rows: " in said
    assert "(in.jsonl line 121) makes the service fail: RuntimeError: the engine choked" in said
    assert "7 of 8 shards are finished" in said
    end_containers(faulty)
    with faulty.changed(container_env={}):  # mended
        kalm(*on_modal(source, out))
    end_containers(faulty)
    assert same(out, local(source, tmp_path / "local"))


@pytest.mark.parametrize("on_error", ["fail", "null"])
def test_texts_that_only_the_model_refuses(
    faulty: Emulator, kalm: Any, tmp_path: Path, on_error: str
) -> None:
    source, out = corpus(tmp_path / "in.jsonl", rows=150, seed=7, r70="refused"), tmp_path / "out"
    words = on_modal(source, out, "--on-error", on_error)
    if on_error == "fail":
        said = kalm(*words, status=1)[1]
        assert "part-000001.parquet (rows 50 to 99, tried 1 time): bad_rows: " in said
        assert "(in.jsonl line 71) is refused" in said
        assert "2 of 3 shards are finished" in said
        return
    kalm(*words)
    rejected = pq.read_table(out / "rejected.parquet").to_pylist()
    assert rejected == [{"row": 70, "place": "in.jsonl line 71", "reason": "is refused"}]
    column = pq.read_table(out / "shards")["vector"]
    assert [n for n, row in enumerate(column.to_pylist()) if row is None] == [70]


def test_bad_rows_are_refused_before_anything_is_uploaded(
    emulator: Emulator, kalm: Any, tmp_path: Path
) -> None:
    source = corpus(tmp_path / "in.jsonl", rows=60, seed=8, r7=" ")
    jobs = set((emulator.volume("kalm-bulk") / "jobs").glob("*"))
    said = kalm(*on_modal(source, tmp_path / "out"), status=2)[1]
    assert "in.jsonl line 8 is white space only" in said
    assert set((emulator.volume("kalm-bulk") / "jobs").glob("*")) == jobs


def test_an_upload_goes_on_where_it_was_interrupted(
    emulator: Emulator, kalm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_PARTS_AT_ONCE", 2)
    source, out = corpus(tmp_path / "in.jsonl", seed=9), tmp_path / "out"
    uploads: list[list[str]] = []
    write = VolumeStore.write

    def interrupted(store: VolumeStore, files: Any) -> None:
        uploads.append(sorted(files))
        if len(uploads) == 3:
            raise KeyboardInterrupt
        write(store, files)

    monkeypatch.setattr(VolumeStore, "write", interrupted)
    kalm(*on_modal(source, out), status=130)
    assert "its upload was interrupted" in kalm("--status", out, status=1)[1]
    assert len(uploads) == 3
    kalm(*on_modal(source, out))
    parts = [[name for name in files if name.startswith("input/")] for files in uploads]
    assert [len(found) for found in parts if found] == [2, 2, 2, 2, 2]
    assert parts[3] == parts[2]
    assert same(out, local(source, tmp_path / "local"))


def test_vectors_of_an_earlier_output_are_uploaded_and_not_embedded(
    emulator: Emulator, kalm: Any, tmp_path: Path
) -> None:
    known = local(corpus(tmp_path / "old.jsonl", rows=200, seed=14), tmp_path / "old")
    source = corpus(tmp_path / "in.jsonl", rows=200, seed=14, r20="a new text")
    kalm(*on_modal(source, tmp_path / "out", "--reuse", known))
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    assert manifest.complete
    assert (manifest.rows, manifest.reused, manifest.requests) == (200, 199, 1)
    made, before = (pq.read_table(f / "shards")["vector"] for f in (tmp_path / "out", known))
    changed = [row for row in range(200) if made[row] != before[row]]
    assert changed == [20]


# -- an input that lies elsewhere --------------------------------------------------------------
def test_an_input_in_a_volume(emulator: Emulator, kalm: Any, tmp_path: Path) -> None:
    copies = {f"r{n}": "again" for n in range(0, 200, 9)}
    source = corpus(tmp_path / "in.jsonl", rows=200, seed=10, **copies)
    volume = modal.Volume.from_name("corpora", create_if_missing=True)
    with volume.batch_upload() as batch:
        batch.put_file(source, "/deep/in.jsonl")
    out = tmp_path / "out"
    shown = json.loads(kalm(*on_modal("modal://corpora/deep/in.jsonl", out, "--json"))[0])
    local(source, tmp_path / "local")
    made, known = (
        np.array(pq.read_table(f / "shards")["vector"].to_pylist(), dtype=np.float32)
        for f in (out, tmp_path / "local")
    )
    # Copies in other shards are embedded again, in another batch.
    assert np.allclose(made, known, atol=1e-4)
    ours, theirs = Manifest.read(out), Manifest.read(tmp_path / "local")
    assert ours is not None
    assert theirs is not None
    assert ours.job == theirs.job
    assert shown["tokens"] == ours.tokens > theirs.tokens
    with volume.batch_upload(force=True) as batch:
        batch.put_file(corpus(tmp_path / "other.jsonl", rows=200, seed=11), "/deep/in.jsonl")
    said = kalm(*on_modal("modal://corpora/deep/in.jsonl", out), status=2)[1]
    assert "modal://corpora/deep/in.jsonl changed since" in said
    missing = kalm(*on_modal("modal://corpora/nothing.jsonl", tmp_path / "no"), status=2)[1]
    assert "there is no " in missing


def test_an_input_in_a_bucket(emulator: Emulator, kalm: Any, tmp_path: Path) -> None:
    emulator.set_secret("bucket-key", {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"})
    there = emulator.bucket("crawl") / "2026"
    there.mkdir()
    for seed in (12, 13):
        corpus(there / f"{seed}.jsonl", rows=100, seed=seed, r5=" ")
    out, options = tmp_path / "out", ["--bucket-secret", "bucket-key"]
    job = sent(kalm, *on_modal("s3://crawl/2026/", tmp_path / "cancelled", *options))
    assert "its input is being read" in kalm("--status", job)[0]
    assert "stopped, before anything was sent" in kalm("--cancel", job)[0]
    assert "could not be prepared" in kalm("--status", job, status=1)[1]
    said = kalm(*on_modal("s3://crawl/2026", out, *options), status=2)[1]
    assert "2 of 200 rows cannot be embedded: 12.jsonl line 6 is white space only" in said
    kalm(*on_modal("s3://crawl/2026", out / "skipped", *options, "--on-error", "skip"))
    assert same(out / "skipped", local(there, tmp_path / "local", on_error="skip"))
    assert pq.read_table(out / "skipped" / "rejected.parquet")["row"].to_pylist() == [5, 105]
