"""The life of containers: starts and restarts, crashes, kills, redeployments, the end."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modal
import pytest
from modal.exception import InternalFailure, RemoteError
from modal_emulator import Emulator
from toy import failing_app, scaling_app, toy_app


@pytest.fixture(scope="module")
def emulator(new_emulator: Any) -> Emulator:
    emulator: Emulator = new_emulator(crash_backoff=(0.05, 0.1))
    emulator.set_secret("toy-secret", {})
    emulator.deploy(toy_app.__file__)
    emulator.deploy(failing_app.__file__)
    return emulator


@pytest.fixture
def toy(emulator: Emulator, modal_client: modal.Client) -> Any:
    return modal.Cls.from_name("toy", "Toy", client=modal_client)()


@pytest.fixture
def failing(emulator: Emulator, modal_client: modal.Client) -> Any:
    return lambda name: modal.Cls.from_name("failing", name, client=modal_client)()


@pytest.fixture
def spawn() -> Iterator[Any]:
    """Spawns calls that are cancelled after the test, which ends crash loops."""
    calls = []

    def spawn(method: Any, *args: Any) -> Any:
        calls.append(method.spawn(*args))
        return calls[-1]

    yield spawn
    for call in calls:
        call.cancel()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -- crash loops -------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["RaisesInEnter", "ExitsInEnter"])
def test_a_container_that_cannot_start_is_started_again_and_again(
    emulator: Emulator, failing: Any, spawn: Any, name: str
) -> None:
    """Modal documents that of deployed apps. The call waits; it does not fail."""
    before = emulator.starts(name)
    call = spawn(failing(name).ping)
    emulator.wait(lambda: emulator.starts(name) >= before + 3)
    with pytest.raises(TimeoutError):
        call.get(timeout=0)


def test_the_waiting_call_is_answered_once_a_container_comes_up(
    emulator: Emulator, failing: Any
) -> None:
    before = emulator.starts("RaisesInEnter")
    call = failing("RaisesInEnter").ping.spawn()
    emulator.wait(lambda: emulator.starts("RaisesInEnter") > before + 1)
    (emulator.volume("failing-notes") / "healed").touch()
    assert call.get(timeout=20) == "pong"
    assert "RuntimeError: cannot load" in emulator.logs("RaisesInEnter")


def test_a_start_that_takes_too_long_is_ended(emulator: Emulator, failing: Any, spawn: Any) -> None:
    before = emulator.starts("HangsInEnter")
    spawn(failing("HangsInEnter").ping)
    emulator.wait(lambda: emulator.starts("HangsInEnter") == before + 2)
    assert "startup-timeout" in emulator.containers("HangsInEnter")[before].events


def test_failed_starts_slow_down_and_may_fail_the_call(new_emulator: Any) -> None:
    """The call's failure is documented for ephemeral apps: it gets the exception of the start."""
    emulator = new_emulator(crashes_until_escalation=3, crash_backoff=(0.1, 10.0))
    emulator.deploy(failing_app.__file__)
    with emulator.client() as client:
        for name, error in [("RaisesInEnter", RuntimeError), ("ExitsInEnter", RemoteError)]:
            with pytest.raises(error, match=r"cannot load|status 3 during startup"):
                modal.Cls.from_name("failing", name, client=client)().ping.remote()
    first, second, third = emulator.containers("ExitsInEnter")
    assert second.events["start"] - first.events["exit"] >= 0.1
    assert third.events["start"] - second.events["exit"] >= 0.2


def test_an_ephemeral_app_gives_up(new_emulator: Any) -> None:
    emulator = new_emulator(crash_backoff=(0.05, 0.1), ephemeral_crashes_until_escalation=2)
    target = f"{failing_app.__file__}::RaisesInEnter.ping"
    done = emulator.cli("run", target, check=False)
    assert done.returncode == 1
    assert "cannot load" in done.stdout + done.stderr
    assert emulator.starts("RaisesInEnter") == 2


# -- lost containers ---------------------------------------------------------------------------
def test_a_call_in_flight_survives_the_kill_of_its_container(
    emulator: Emulator, failing: Any
) -> None:
    before = emulator.starts("Dies")
    call = failing("Dies").note.spawn("in-flight", 0.3)
    emulator.wait((emulator.volume("failing-notes") / "in-flight").exists)
    killed = emulator.kill("Dies")
    assert killed.exit_status == -signal.SIGKILL
    assert call.get(timeout=20) != killed.pid
    assert emulator.starts("Dies") == before + 2


def test_an_input_that_kills_its_containers_ends_as_an_internal_failure(
    emulator: Emulator, failing: Any
) -> None:
    with (
        emulator.changed(max_internal_failures=3),
        pytest.raises(InternalFailure, match="status 13"),
    ):
        failing("Dies").die.remote()
    assert [c.exit_status for c in emulator.containers("Dies")].count(13) == 3


@pytest.mark.parametrize("how", ["main process", "container"])
def test_no_process_outlives_its_container(emulator: Emulator, toy: Any, how: str) -> None:
    pids = toy.spawn_children.remote()
    assert all(alive(pid) for pid in pids)
    if how == "container":
        emulator.kill("Toy")
    else:
        os.kill(pids[0], signal.SIGKILL)
    emulator.wait(lambda: not any(alive(pid) for pid in pids))


# -- scaling -----------------------------------------------------------------------------------
def test_max_containers(emulator: Emulator, modal_client: modal.Client) -> None:
    square = modal.Function.from_name("toy", "square", client=modal_client)
    assert len(list(square.map(range(50)))) == 50
    assert emulator.starts("square") == 2


def test_idle_containers_go_except_for_the_least(
    emulator: Emulator, modal_client: modal.Client
) -> None:
    emulator.deploy(scaling_app.__file__)
    emulator.wait(lambda: emulator.running("warm"))
    pids = [
        modal.Function.from_name("scaling", name, client=modal_client).remote()
        for name in ("brief", "warm")
    ]
    emulator.wait(lambda: not alive(pids[0]))
    time.sleep(0.5)
    assert alive(pids[1])
    assert emulator.starts("warm") == 1
    assert "scaledown" in emulator.containers("brief")[0].events


def test_the_least_number_of_containers_is_kept_up(emulator: Emulator) -> None:
    emulator.deploy(scaling_app.__file__)
    emulator.wait(lambda: emulator.running("warm"))
    emulator.kill("warm")
    emulator.wait(lambda: emulator.running("warm"))


def test_a_container_may_ask_for_no_more_inputs(emulator: Emulator, failing: Any) -> None:
    first = failing("Dies").leave.remote()
    assert failing("Dies").note.remote("after", 0) != first
    emulator.wait(lambda: not alive(first))


# -- deployments -------------------------------------------------------------------------------
def test_a_redeployment_lets_calls_finish_and_replaces_the_container(
    emulator: Emulator, failing: Any
) -> None:
    call = failing("Dies").note.spawn("redeploy", 2)
    emulator.wait((emulator.volume("failing-notes") / "redeploy").exists)
    (old,) = emulator.running("Dies")
    emulator.deploy(failing_app.__file__)
    assert failing("Dies").note.remote("new", 0) != old.pid
    assert call.get(timeout=20) == old.pid
    emulator.wait(old.gone.is_set)
    assert old.exit_status == 0


def test_stopping_an_app_runs_exit_hooks_and_ends_calls(emulator: Emulator, toy: Any) -> None:
    toy.echo.remote(1)
    call = toy.work.spawn(0.5)
    emulator.wait(lambda: emulator.cloud.calls[call.object_id].inputs)
    (container,) = emulator.running("Toy")
    emulator.stop_app("toy")
    assert "exit hook ran" in container.log
    with pytest.raises(RemoteError, match="stopped"):
        call.get(timeout=5)
    emulator.deploy(toy_app.__file__)
