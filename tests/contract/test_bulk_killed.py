"""`kalm embed` as a process: killed, out of space, out of service; and then run again.

Each time the files have to be those of a run that nothing disturbed, byte for byte.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

ROWS = 2_000
SHARD = 125
KALM = [sys.executable, "-m", "kalm_integrations.cli"]


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KALM_")}
    return kept | {"KALM_BACKEND": "local"} | variables


def command(source: Path, out: Path) -> list[Any]:
    return [*KALM, "embed", source, "--output", out, "--shard-rows", SHARD, "--id-column", "id"]


def start(source: Path, out: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(map(str, command(source, out))),
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(out: Path) -> int:
    """Shards that the manifest calls finished."""
    try:
        return len(json.loads((out / "manifest.json").read_bytes())["shards"])
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short texts, a third of them copies of others, far and near."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("bulk") / "in.jsonl"
    with path.open("w") as file:
        for number in range(ROWS):
            text = f"What is known of number {rng.randrange(ROWS)}, of {rng.choice('abc')}?"
            file.write(json.dumps({"id": number, "text": text}) + "\n")
    return path


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("undisturbed")
    with start(source, out) as process:
        said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert pq.read_table(out / "shards")["id"].to_pylist() == list(range(ROWS))
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "shards").iterdir()}


def is_undisturbed(out: Path, undisturbed: Any) -> bool:
    assert json.loads((out / "manifest.json").read_bytes())["complete"]
    hidden = {path.name for path in out.rglob(".*")}
    return hidden <= {".lock"} and contents(out) == undisturbed


def go_on(source: Path, out: Path, **variables: str) -> tuple[str, str]:
    with start(source, out, **variables) as process:
        said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def killed_midway(source: Path, out: Path, rng: random.Random, **variables: str) -> int:
    """Start it, kill it some time after it got further; shards that are finished then."""
    before = finished(out)
    with start(source, out, **variables) as process:
        while finished(out) <= before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
    return finished(out)


@pytest.mark.parametrize("seed", range(2))
def test_killed_anywhere_and_run_again_it_ends_as_if_undisturbed(
    source: Path, undisturbed: Any, tmp_path: Path, seed: int
) -> None:
    rng, out = random.Random(seed), tmp_path / "out"
    for _ in range(2):
        done = killed_midway(source, out, rng)
        assert 0 < done * SHARD < ROWS
    _, said = go_on(source, out)
    assert f"{done * SHARD:,} rows done before" in said
    assert is_undisturbed(out, undisturbed)
    assert json.loads((out / "manifest.json").read_bytes())["runs"] == 3


def test_ctrl_c_is_quiet_and_loses_nothing(source: Path, undisturbed: Any, tmp_path: Path) -> None:
    for attempt in range(5):  # the job may end before the signal arrives
        out = tmp_path / str(attempt)
        with start(source, out) as process:
            while not finished(out):
                time.sleep(0.002)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        if process.returncode:
            break
    assert process.returncode == 130
    assert "Traceback" not in said
    assert 0 < finished(out) * SHARD < ROWS
    assert f"{finished(out) * SHARD:,} of {ROWS:,} rows are finished" in said
    go_on(source, out)
    assert is_undisturbed(out, undisturbed)


def test_a_full_disk_costs_the_shard_that_did_not_fit_and_no_other(
    source: Path, undisturbed: Any, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m none {shlex.quote(str(disk))}"
    if subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount], check=False, capture_output=True
    ).returncode:
        pytest.skip("needs unshare(1) and the right to mount a tmpfs in a namespace of its own")
    embed = shlex.join(map(str, command(source, disk / "out")))
    script = (
        f"{mount}\n{embed} 2>{tmp_path}/said; echo $? >{tmp_path}/status\n"
        f"cp {disk}/out/manifest.json {tmp_path}/first.json\n"
        f"find {disk} -name '*.tmp' >{tmp_path}/left\n"
        f"mount -o remount,size=100m {disk}\n{embed} && cp -r {disk}/out {tmp_path}/out"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "status").read_text() == "1\n"
    assert "No space left on device" in (tmp_path / "said").read_text()
    assert (tmp_path / "left").read_text() == ""
    first = json.loads((tmp_path / "first.json").read_bytes())
    assert 0 < first["rows"] < ROWS
    assert not first["complete"]
    assert is_undisturbed(tmp_path / "out", undisturbed)


with socket.socket() as _free:
    _free.bind(("127.0.0.1", 0))
    PORT = _free.getsockname()[1]
OVER_HTTP = {
    "KALM_BACKEND": "http",
    "KALM_BASE_URL": f"http://127.0.0.1:{PORT}",
    "KALM_API_KEY": "correct-horse",
    "KALM_MODEL": "universal-sentence-encoder-multilingual-3",
}


@contextmanager
def serving() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*KALM, "serve", "--port", str(PORT)],
        env=environment(KALM_API_KEY="correct-horse"),
        stderr=subprocess.PIPE,
        text=True,
    ) as service:
        try:
            assert service.stderr
            assert any("ready" in line for line in service.stderr)
            yield service
        finally:
            service.kill()


def test_a_service_that_dies_for_good_ends_the_job_and_the_same_command_goes_on(
    source: Path, undisturbed: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with serving() as service:
        with start(source, out, **OVER_HTTP, KALM_MAX_RETRIES="1") as process:
            while not finished(out):
                assert process.poll() is None
                time.sleep(0.002)
            service.kill()
            _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in said
    assert 0 < finished(out) * SHARD < ROWS
    with serving():
        go_on(source, out, **OVER_HTTP)
    assert is_undisturbed(out, undisturbed)


def test_a_service_that_is_started_anew_is_waited_for(
    source: Path, undisturbed: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with serving() as service:
        process = start(source, out, **OVER_HTTP)
        while not finished(out):
            assert process.poll() is None
            time.sleep(0.002)
        service.kill()
    before = finished(out)
    time.sleep(2)
    assert process.poll() is None
    with serving():
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0
    assert 0 < before * SHARD < ROWS
    assert said.count("serves no requests") == 1  # for dozens of retries
    assert is_undisturbed(out, undisturbed)


def test_a_second_process_is_kept_out_until_the_first_is_gone(
    source: Path, undisturbed: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with start(source, out) as first:
        while not finished(out):
            time.sleep(0.002)
        psutil.Process(first.pid).suspend()
        with start(source, out) as second:
            _, said = second.communicate(timeout=60)
        assert second.returncode == 2
        assert f"another process is at work in {out}" in said
        first.kill()
    go_on(source, out)
    assert is_undisturbed(out, undisturbed)
    shutil.rmtree(out)
