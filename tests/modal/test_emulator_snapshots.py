"""Memory snapshots: what changes between the checkpoint and the restored container."""

from collections.abc import Iterator
from typing import Any

import modal
import pytest
from modal_emulator import Emulator
from toy import toy_app


@pytest.fixture(scope="module")
def emulator(new_emulator: Any) -> Emulator:
    emulator: Emulator = new_emulator(crash_backoff=(0.05, 0.1))
    emulator.set_secret("toy-secret", {})
    emulator.deploy(toy_app.__file__)
    return emulator


@pytest.fixture
def toy(emulator: Emulator, modal_client: modal.Client) -> Iterator[Any]:
    """The class, cold."""
    emulator.set_secret("toy-secret", {"TOY_SECRET": "before", "TOY_DROPPED": "still here"})
    yield modal.Cls.from_name("toy", "Toy", client=modal_client)()
    emulator.kill("Toy")


def test_the_restored_container_is_another_one_with_the_same_memory(
    emulator: Emulator, toy: Any
) -> None:
    (first, snapped), (then, restored) = toy.life.remote()
    assert (first, then) == ("snap", "restored")
    assert snapped["pid"] == restored["pid"]
    assert snapped["task_id"] != restored["task_id"]
    assert snapped["hostname"] != restored["hostname"]
    (container,) = emulator.running("Toy")
    assert container.task_ids == [snapped["task_id"], restored["task_id"]]


def test_secrets_rotated_since_the_snapshot_are_seen_after_the_restore(
    emulator: Emulator, toy: Any
) -> None:
    with emulator.changed(restore_env={"MODAL_REGION": "elsewhere"}):
        with emulator.holding_restores():
            call = toy.life.spawn()
            emulator.wait(lambda: emulator.held("Toy"))
            emulator.set_secret("toy-secret", {"TOY_SECRET": "after"})
        (_, snapped), (_, restored) = call.get(timeout=20)
    assert (snapped["secret"], restored["secret"]) == ("before", "after")
    assert (snapped["region"], restored["region"]) == ("local", "elsewhere")
    # Modal's runtime adds and changes variables, and removes none.
    assert restored["dropped"] == "still here"


def test_a_gpu_that_cannot_be_restored_means_a_start_without_snapshot(
    emulator: Emulator, toy: Any
) -> None:
    """The runtime ends the container with status 222, its word for that."""
    with emulator.changed(gpu_restore="error"):
        (_, snapped), (_, restored) = toy.life.remote()
    assert snapped["task_id"] == restored["task_id"]
    failed, second = emulator.containers("Toy")[-2:]
    assert failed.exit_status == 222
    assert "GPU memory snapshot restore failed" in failed.log
    assert "checkpoint" not in second.events
