"""Volumes through the client's API, of both versions."""

import io
from pathlib import Path
from typing import Any

import modal
import pytest
from modal.exception import InvalidError, NotFoundError
from modal.types import FileEntryType
from modal_emulator import Emulator

MIB = 1024 * 1024


@pytest.fixture(scope="module", params=[1, 2])
def volume(request: Any, emulator: Emulator, modal_client: modal.Client) -> modal.Volume:
    name = f"files-{request.param}"
    return modal.Volume.from_name(
        name, create_if_missing=True, version=request.param, client=modal_client
    )


def put(volume: modal.Volume, name: str, data: bytes, *, force: bool = False) -> None:
    with volume.batch_upload(force=force) as batch:
        batch.put_file(io.BytesIO(data), name)


def read(volume: modal.Volume, name: str) -> bytes:
    return b"".join(volume.read_file(name))


def names(volume: modal.Volume, path: str, **options: bool) -> list[str]:
    return sorted(entry.path for entry in volume.listdir(path, **options))


def test_a_volume_that_is_not_created_is_not_found(modal_client: modal.Client) -> None:
    with pytest.raises(NotFoundError, match="'absent' not found"):
        modal.Volume.from_name("absent", client=modal_client).hydrate()


def test_a_volume_keeps_its_version(volume: modal.Volume, modal_client: modal.Client) -> None:
    volume.hydrate()
    name = volume.name
    assert name is not None
    wrong = 1 if name.endswith("2") else 2
    again = modal.Volume.from_name(name, client=modal_client).hydrate()
    assert again.object_id == volume.object_id
    with pytest.raises(InvalidError, match=f"not v{wrong} as requested"):
        modal.Volume.from_name(name, version=wrong, client=modal_client).hydrate()


def test_files_of_a_batch_come_from_memory_paths_and_directories(
    volume: modal.Volume, emulator: Emulator, tmp_path: Path
) -> None:
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "top.txt").write_text("top")
    (tmp_path / "tree" / "deep" / "low.txt").write_text("low")
    with volume.batch_upload() as batch:
        batch.put_file(io.BytesIO(b"memory"), "/batch/memory.txt")
        batch.put_file(tmp_path / "tree" / "top.txt", "batch/path.txt")
        batch.put_directory(tmp_path / "tree", "batch/tree")
    name = volume.name
    assert name is not None
    root = emulator.volume(name) / "batch"
    found = {str(p.relative_to(root)): p.read_text() for p in root.rglob("*") if p.is_file()}
    assert found == {
        "memory.txt": "memory",
        "path.txt": "top",
        "tree/top.txt": "top",
        "tree/deep/low.txt": "low",
    }


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        b"zeros" + bytes(9 * MIB),
        b"zeros" + bytes(9 * MIB) + b"between",
        bytes(MIB),
        b"x" * 8 * MIB + b"past one",
    ],
    ids=["empty", "short", "zeros at the end", "zeros between", "only zeros", "two blocks"],
)
def test_what_is_read_is_what_was_put(volume: modal.Volume, data: bytes) -> None:
    put(volume, "sizes/file", data, force=True)
    assert read(volume, "sizes/file") == data
    into = io.BytesIO()
    assert volume.read_file_into_fileobj("/sizes/file", into) == len(data)
    assert into.getvalue() == data


def test_a_block_that_is_damaged_on_its_way_is_refused(
    volume: modal.Volume, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator sends the digests that the client checks; here it sends wrong ones."""
    put(volume, "digest", b"content", force=True)
    monkeypatch.setattr("modal_emulator.volume_blocks.base64.b64encode", lambda _: b"A" * 43 + b"=")
    with pytest.raises(Exception, match="corrupted"):
        read(volume, "digest")


def test_what_a_container_or_a_test_wrote_is_read(volume: modal.Volume, emulator: Emulator) -> None:
    volume.hydrate()
    name = volume.name
    assert name is not None
    (emulator.volume(name) / "written.txt").write_text("by hand")
    assert read(volume, "written.txt") == b"by hand"


def test_a_file_is_overwritten_only_by_force(volume: modal.Volume) -> None:
    put(volume, "twice", b"one")
    with pytest.raises(FileExistsError):
        put(volume, "twice", b"two")
    assert read(volume, "twice") == b"one"
    put(volume, "twice", b"three", force=True)
    assert read(volume, "twice") == b"three"


def test_a_refused_batch_writes_nothing(volume: modal.Volume) -> None:
    put(volume, "whole/there", b"one")
    with pytest.raises(FileExistsError), volume.batch_upload() as batch:
        batch.put_file(io.BytesIO(b"new"), "whole/new")
        batch.put_file(io.BytesIO(b"two"), "whole/there")
    assert names(volume, "whole") == ["whole/there"]


def test_listing_is_of_one_level_or_of_all(volume: modal.Volume) -> None:
    put(volume, "list/one", b"1")
    put(volume, "list/in/two", b"22")
    assert names(volume, "list") == ["list/in", "list/one"]
    assert names(volume, "/list", recursive=True) == ["list/in", "list/in/two", "list/one"]
    assert sorted(e.path for e in volume.iterdir("list/in")) == ["list/in/two"]
    (entry,) = volume.listdir("list/in/two")
    assert (entry.path, entry.type, entry.size) == ("list/in/two", FileEntryType.FILE, 2)
    assert "list" in names(volume, "/")


def test_removing_files_and_directories(volume: modal.Volume) -> None:
    put(volume, "gone/file", b"1")
    put(volume, "gone/in/file", b"2")
    volume.remove_file("gone/file")
    assert names(volume, "gone", recursive=True) == ["gone/in", "gone/in/file"]
    with pytest.raises(InvalidError, match="directory"):
        volume.remove_file("gone")
    volume.remove_file("gone", recursive=True)
    assert "gone" not in names(volume, "/")


def test_copies_are_as_of_cp(volume: modal.Volume) -> None:
    put(volume, "from/file", b"copied")
    put(volume, "into/kept", b"kept")
    volume.copy_files(["from/file"], "into")
    volume.copy_files(["from/file"], "into/renamed")
    assert names(volume, "into") == ["into/file", "into/kept", "into/renamed"]
    assert read(volume, "into/renamed") == b"copied"


@pytest.mark.parametrize("path", ["missing", "missing/deeper"])
def test_missing_paths_are_errors(volume: modal.Volume, path: str) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        read(volume, path)
    with pytest.raises(FileNotFoundError, match="missing"):
        volume.read_file_into_fileobj(path, io.BytesIO())
    with pytest.raises(FileNotFoundError, match="missing"):
        volume.remove_file(path)
    with pytest.raises(NotFoundError, match="missing"):
        volume.listdir(path)


def test_a_download_is_of_the_file_as_it_was_when_it_began(
    volume: modal.Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiprocessing.cpu_count", lambda: 1)  # as many blocks are prefetched
    put(volume, "replaced", b"old" * 16 * MIB, force=True)
    chunks = iter(volume.read_file("replaced"))
    start = next(chunks)
    put(volume, "replaced", b"new", force=True)
    assert start + b"".join(chunks) == b"old" * 16 * MIB


def test_a_volume_may_be_ephemeral_or_deleted(modal_client: modal.Client) -> None:
    with modal.Volume.ephemeral(client=modal_client) as volume:
        put(volume, "here", b"1")
        assert names(volume, "/") == ["here"]
    modal.Volume.from_name("brief", create_if_missing=True, client=modal_client).hydrate()
    modal.Volume.objects.delete("brief", client=modal_client)
    with pytest.raises(NotFoundError):
        modal.Volume.from_name("brief", client=modal_client).hydrate()


def test_no_rpc_was_missing(emulator: Emulator) -> None:
    assert not emulator.unimplemented
