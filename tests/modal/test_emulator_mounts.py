"""Mounted volumes and buckets: what a container sees, and when others see what it wrote."""

import io
from typing import Any

import modal
import pytest
from modal_emulator import Emulator
from modal_emulator.sandbox import isolation_works
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


def put(volume: modal.Volume, name: str, data: bytes) -> None:
    with volume.batch_upload(force=True) as batch:
        batch.put_file(io.BytesIO(data), name)


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


def test_uploads_are_seen_after_a_reload(one: Any, volume: Any) -> None:
    name, api = volume
    path = f"{name}/uploaded.txt"
    assert one(("read", path)) == [None]
    put(api, "uploaded.txt", b"from the laptop")
    assert one(("read", path), ("reload", name), ("read", path))[::2] == [None, "from the laptop"]
    put(api, "uploaded.txt", b"from the laptop again")
    assert one(("reload", name), ("read", path)) == [None, "from the laptop again"]


def test_deletions_travel_both_ways(one: Any, other: Any, volume: Any) -> None:
    name, api = volume
    one(("write", f"{name}/away/file", "x"), ("commit", name))
    assert other(("reload", name), ("remove", f"{name}/away/file"), ("commit", name))
    assert api.listdir("away") == []
    assert one(("read", f"{name}/away/file"), ("reload", name), ("list", f"{name}/away")) == [
        "x",
        None,
        [],
    ]
    api.remove_file("away", recursive=True)
    assert "away" not in one(("reload", name), ("list", name))[1]


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


def test_a_volume_that_is_not_mounted_cannot_be_committed(function: Any) -> None:
    with pytest.raises(RuntimeError, match="not mounted in this container"):
        function("unmounted").remote()


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


def test_modal_may_commit_at_any_moment(one: Any, deployed: Emulator) -> None:
    one(("write", "first/half", "hal"))
    assert not (deployed.volume("volumes-first") / "half").exists()
    deployed.commit_in_background("one")
    assert (deployed.volume("volumes-first") / "half").read_text() == "hal"


def test_links_are_kept(one: Any, other: Any) -> None:
    one(("write", "first/blob", "x"), ("link", "first/name", "blob"), ("commit", "first"))
    assert other(("reload", "first"), ("read", "first/name")) == [None, "x"]


def test_only_a_part_may_be_mounted_and_what_is_written_read_only_goes_nowhere(
    one: Any, function: Any, deployed: Emulator
) -> None:
    one(("write", "first/part/file", "x"), ("write", "first/rest", "y"), ("commit", "first"))
    assert function("reader").remote([("list", "part")]) == [["file"]]
    function("reader").remote([("write", "part/refused", "z"), ("commit", "first")])
    assert not (deployed.volume("volumes-first") / "part" / "refused").exists()


# -- with_options and buckets ------------------------------------------------------------------
def test_a_variant_mounts_other_volumes_in_place_of_its_own(
    function: Any, deployed: Emulator, modal_client: modal.Client
) -> None:
    extra = modal.Volume.from_name("extra", create_if_missing=True, client=modal_client)
    put(extra, "in/extra", b"x")
    bare = function("bare").with_options(volumes={"/root/here": extra})
    assert bare.remote("here") == ["in", "in/extra"]
    assert function("bare").remote("here") == []
    replaced = function("one").with_options(volumes={"/root/here": extra})
    assert replaced.remote([("list", "here"), ("list", "first")]) == [["in", "in/extra"], []]


def test_a_bucket_is_a_directory_that_the_test_fills(
    function: Any, deployed: Emulator, modal_client: modal.Client
) -> None:
    bucket = deployed.bucket("corpus")
    (bucket / "texts" / "in").mkdir(parents=True)
    (bucket / "texts" / "in" / "a.jsonl").write_text("{}")
    (bucket / "other").touch()
    deployed.set_secret("bucket-key", {"AWS_ACCESS_KEY_ID": "x"})
    secret = modal.Secret.from_name("bucket-key", client=modal_client)
    mount = modal.CloudBucketMount("corpus", key_prefix="texts/", secret=secret)
    assert function("bare").with_options(volumes={"/root/s3": mount}).remote("s3") == [
        "in",
        "in/a.jsonl",
    ]


@pytest.mark.parametrize("read_only", [True, False])
def test_a_bucket_is_written_at_once_unless_it_is_read_only(
    function: Any, deployed: Emulator, read_only: bool
) -> None:
    mount = modal.CloudBucketMount("written", read_only=read_only)
    writer = function("one").with_options(volumes={"/root/s3": mount})
    path = f"file-{read_only}"
    writer.remote([("write", f"s3/{path}", "x")])
    assert (deployed.bucket("written") / path).exists() is not read_only


@pytest.mark.skipif(not isolation_works(), reason="needs root and Linux namespaces")
def test_an_isolated_container_cannot_write_what_is_read_only(new_emulator: Any) -> None:
    emulator = new_emulator(isolated=True)
    emulator.deploy(volume_app.__file__)
    with emulator.client() as client:
        bucket = modal.CloudBucketMount("sealed", read_only=True)
        one = modal.Function.from_name("volumes", "one", client=client)
        with pytest.raises(OSError, match="Read-only"):
            one.with_options(volumes={"/root/s3": bucket}).remote([("write", "s3/file", "x")])
        with pytest.raises(RuntimeError, match="open files"):
            one.remote([("write", "first/a", "x"), ("open", "first/a"), ("reload", "first")])


def test_no_rpc_was_missing(deployed: Emulator) -> None:
    assert not deployed.unimplemented
