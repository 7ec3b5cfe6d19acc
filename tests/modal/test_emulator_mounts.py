"""Mounted volumes and buckets: what a container sees, and when others see what it wrote."""

from typing import Any

import modal
import pytest
from modal_emulator import Emulator
from toy import volume_app


@pytest.fixture(scope="module")
def deployed(emulator: Emulator) -> Emulator:
    emulator.deploy(volume_app.__file__)
    return emulator


@pytest.fixture
def function(deployed: Emulator, modal_client: modal.Client) -> Any:
    return lambda name: modal.Function.from_name("volumes", name, client=modal_client)


@pytest.fixture
def one(function: Any) -> Any:
    return lambda *steps: function("one").remote(list(steps))


@pytest.fixture
def other(function: Any) -> Any:
    return lambda *steps: function("other").remote(list(steps))


@pytest.fixture(params=["first", "second"])
def volume(request: Any, deployed: Emulator, modal_client: modal.Client) -> Any:
    """A volume of version 1, and one of version 2; its mount is named like it."""
    name = request.param
    found = modal.Volume.from_name(f"volumes-{name}", client=modal_client).hydrate()
    return name, found


def test_others_see_nothing_before_the_commit_and_their_reload(
    one: Any, other: Any, volume: Any, deployed: Emulator
) -> None:
    name, api = volume
    path, file = f"{name}/shared.txt", deployed.volume(f"volumes-{name}") / "shared.txt"
    assert other(("read", path)) == [None]
    assert one(("write", path, "new"), ("read", path)) == [None, "new"]
    assert not file.exists()
    one(("commit", name))
    assert file.read_text() == "new"
    assert b"".join(api.read_file("shared.txt")) == b"new"
    assert other(("read", path), ("reload", name), ("read", path)) == [None, None, "new"]


def test_the_last_commit_of_a_file_wins(one: Any, other: Any, deployed: Emulator) -> None:
    one(("write", "first/both", "one"), ("write", "first/only-one", "1"))
    other(("write", "first/both", "other"), ("write", "first/only-other", "2"), ("commit", "first"))
    assert one(("reload", "first"), ("read", "first/both"), ("read", "first/only-other")) == [
        None,
        "one",
        "2",
    ]
    one(("commit", "first"))
    assert (deployed.volume("volumes-first") / "both").read_text() == "one"
    assert other(("reload", "first"), ("read", "first/both")) == [None, "one"]


def test_a_reload_keeps_what_is_not_committed(one: Any, deployed: Emulator) -> None:
    one(("write", "first/own", "mine"))
    assert one(("reload", "first"), ("read", "first/own")) == [None, "mine"]
    assert not (deployed.volume("volumes-first") / "own").exists()


@pytest.mark.parametrize("how", ["open", "enter"])
@pytest.mark.parametrize("operation", ["reload", "commit"])
def test_open_files_prevent_a_reload_and_that_of_a_commit(
    one: Any, deployed: Emulator, how: str, operation: str
) -> None:
    one(("write", "first/held/file", "x"))
    path = "first/held/file" if how == "open" else "first/held"
    with pytest.raises(RuntimeError, match="there are open files preventing the operation"):
        one((how, path), (operation, "first"))
    assert one(("enter", "."), (operation, "first"), ("read", "first/held/file"))[2] == "x"


def test_the_end_of_a_container_commits(deployed: Emulator, modal_client: modal.Client) -> None:
    leaves = modal.Cls.from_name("volumes", "Leaves", client=modal_client)()
    leaves.write.remote("left", "behind")
    root = deployed.volume("volumes-first")
    assert not (root / "left").exists()
    deployed.deploy(volume_app.__file__)
    deployed.wait(lambda: all(c.gone.is_set() for c in deployed.containers("Leaves")))
    assert (root / "left").read_text() == "behind"
    assert (root / "written-at-exit").read_text() == "bye"


def test_a_killed_container_loses_what_it_did_not_commit(
    one: Any, deployed: Emulator, function: Any
) -> None:
    one(("write", "first/safe", "1"), ("commit", "first"), ("write", "first/lost", "2"))
    deployed.kill("one")
    assert one(("read", "first/safe"), ("read", "first/lost")) == ["1", None]
    assert not (deployed.volume("volumes-first") / "lost").exists()
