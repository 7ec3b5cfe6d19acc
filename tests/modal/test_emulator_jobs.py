"""Spawned calls: they outlive who spawned them, are retried by the server, and can be cancelled."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modal
import pytest
from modal.exception import RemoteError
from modal_emulator import Emulator
from toy import job_app

LAPTOP = """
import sys, time, modal
worker = modal.Cls.from_name("jobs", "Worker")()
call = worker.work.experimental_spawn_map(range(6), [0.0] * 6, [sys.argv[1]] * 6)
print(call.object_id, flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def deployed(emulator: Emulator) -> Emulator:
    emulator.set_secret("job-secret", {"JOB_SECRET": "of the class"})
    emulator.set_secret("other-secret", {"JOB_SECRET": "of the variant"})
    emulator.deploy(job_app.__file__)
    return emulator


@pytest.fixture(scope="module")
def worker_class(deployed: Emulator, modal_client: modal.Client) -> Any:
    return modal.Cls.from_name("jobs", "Worker", client=modal_client)


@pytest.fixture(scope="module")
def worker(worker_class: Any) -> Any:
    return worker_class()


@pytest.fixture
def again(modal_client: modal.Client) -> Any:
    """The same call, by its id alone."""
    return lambda call_id: modal.FunctionCall.from_id(call_id, client=modal_client)


@pytest.fixture
def go_on(tmp_path: Path) -> Path:
    """Inputs that are told to wait for it end when a test makes it."""
    return tmp_path / "go-on"


def begun(emulator: Emulator, number: int) -> int:
    return len(re.findall(rf"begun {number}\n", emulator.logs("Worker")))


def test_inputs_go_on_after_the_laptop_died(
    deployed: Emulator, again: Any, worker: Any, go_on: Path
) -> None:
    laptop = subprocess.Popen(
        [sys.executable, "-c", LAPTOP, str(go_on)],
        env={**os.environ, **deployed.client_env},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert laptop.stdout is not None
    call = again(laptop.stdout.readline().strip())
    laptop.send_signal(signal.SIGKILL)
    assert laptop.wait() == -signal.SIGKILL
    laptop.stdout.close()
    with pytest.raises(TimeoutError):
        call.get(timeout=0, index=5)
    go_on.touch()
    assert [number for number, *_ in call.iter()] == list(range(6))


def test_a_spawned_input_is_retried_and_only_its_last_attempt_counts(worker: Any) -> None:
    call = worker.fails.experimental_spawn_map([40, 41], [2, 0])
    assert list(call.iter()) == [3, 1]
    assert call.get(index=0) == 3


def test_retries_end(worker: Any, deployed: Emulator) -> None:
    call = worker.fails.spawn(43, 9)
    with pytest.raises(ValueError, match="failure 3"):
        call.get(timeout=60)
    assert deployed.logs("Worker").count("attempt 43 ") == 3


def test_inputs_of_a_lost_container_run_again(worker: Any, deployed: Emulator, go_on: Path) -> None:
    call = worker.work.experimental_spawn_map([50, 51, 52], [0.0] * 3, [str(go_on)] * 3)
    deployed.wait(lambda: begun(deployed, 50) and begun(deployed, 51))
    killed = deployed.kill("Worker")
    go_on.touch()
    answers = list(call.iter())
    assert [number for number, *_ in answers] == [50, 51, 52]
    assert killed.pid not in {pid for *_, pid in answers}
    deployed.wait(lambda: begun(deployed, 52))  # a log may arrive after the answer
    assert [begun(deployed, number) for number in (50, 51, 52)] == [2, 2, 1]


@pytest.mark.parametrize("terminate", [False, True])
def test_a_cancelled_map_drops_what_is_queued_and_stops_what_runs(
    worker_class: Any, deployed: Emulator, again: Any, go_on: Path, terminate: bool
) -> None:
    untils = ["", *[str(go_on)] * 5]
    base = 60 + 10 * terminate
    variant = worker_class.with_options(scaledown_window=20 + terminate)()
    call = variant.work.experimental_spawn_map(range(base, base + 6), [0.0] * 6, untils)
    assert call.get(timeout=60, index=0)[0] == base
    # Both run at the same time: either one may be the first to begin.
    deployed.wait(lambda: begun(deployed, base + 1) and begun(deployed, base + 2))
    again(call.object_id).cancel(terminate_containers=terminate)
    for index in range(1, 6):
        with pytest.raises(RemoteError, match="cancelled"):
            call.get(timeout=60, index=index)
    assert call.get(index=0)[0] == base
    assert not any(begun(deployed, number) for number in range(base + 3, base + 6))
    assert variant.work.remote(base + 9)[0] == base + 9
    gone = [c for c in deployed.containers("Worker") if c.exit_status == -signal.SIGKILL]
    assert any(f"begun {base + 1}\n" in c.log for c in gone) is terminate
    go_on.touch()


@pytest.fixture
def first_version(deployed: Emulator) -> Iterator[None]:
    yield
    deployed.deploy(job_app.__file__)


def test_a_redeployment_lets_running_inputs_finish_and_runs_queued_ones_anew(
    worker: Any, worker_class: Any, deployed: Emulator, first_version: None, go_on: Path
) -> None:
    untils = [str(go_on), str(go_on), "", ""]
    variant = worker_class.with_options(scaledown_window=30)()
    calls = [
        pool.work.experimental_spawn_map(range(base, base + 4), [0.0] * 4, untils)
        for pool, base in ((worker, 100), (variant, 110))
    ]
    deployed.wait(lambda: all(begun(deployed, number) for number in (100, 101, 110, 111)))
    deployed.deploy(job_app.__file__, env={"JOB_VERSION": "2"})
    for call in calls:
        assert call.get(index=2, timeout=60)[1] == "2"
    go_on.touch()
    for call in calls:
        answers = list(call.iter())
        assert [version for _, version, _ in answers] == ["1", "1", "2", "2"]
        (old,) = {pid for *_, pid in answers[:2]}
        (container,) = [c for c in deployed.containers("Worker") if c.pid == old]
        deployed.wait(container.gone.is_set)
        assert container.exit_status == 0
    assert all(begun(deployed, n) == 1 for base in (100, 110) for n in range(base, base + 4))


def test_a_container_that_fetches_no_more_finishes_what_it_has(
    worker: Any, deployed: Emulator, go_on: Path
) -> None:
    both = worker.work.spawn(130, 0.0, str(go_on))
    deployed.wait(lambda: begun(deployed, 130))
    left = worker.leave.spawn(131).get(timeout=60)[2]
    after = worker.work.experimental_spawn_map(range(132, 135))
    assert left not in {pid for *_, pid in after.iter()}
    go_on.touch()
    assert both.get(timeout=60)[2] == left
    (container,) = [c for c in deployed.containers("Worker") if c.pid == left]
    deployed.wait(container.gone.is_set)
    assert (container.exit_status, "stop-fetching" in container.events) == (0, True)
