"""Volumes: their committed files, and what the client's API does to them."""

import asyncio
import collections
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from grpclib import GRPCError, Status
from modal_proto import api_pb2

from .tokens import new_id
from .working_copy import place, scan

_TYPES = {
    "file": api_pb2.FileEntry.FILE,
    "directory": api_pb2.FileEntry.DIRECTORY,
    "link": api_pb2.FileEntry.SYMLINK,
}


def _no_such(path: str) -> GRPCError:
    return GRPCError(Status.NOT_FOUND, f"No such file or directory: '{path}'")


@dataclass(eq=False)
class Volume:
    """`directory` holds what is committed. A file there is replaced and never written in place."""

    volume_id: str
    name: str
    version: "api_pb2.VolumeFsVersion.ValueType"
    directory: Path
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def metadata(self) -> api_pb2.VolumeMetadata:
        return api_pb2.VolumeMetadata(name=self.name, version=self.version)

    @property
    def staging(self) -> Path:
        return self.directory.with_name(f"{self.volume_id}-staging")

    def path(self, name: str) -> Path:
        """A name of the API: absolute or relative, both from the volume's root."""
        parts = [part for part in PurePosixPath(name).parts if part != "/"]
        if ".." in parts:
            raise GRPCError(Status.INVALID_ARGUMENT, f"'{name}' leads out of the volume")
        return self.directory.joinpath(*parts)

    def existing(self, name: str) -> Path:
        path = self.path(name)
        if not os.path.lexists(path):
            raise _no_such(name)
        return path

    def file(self, name: str) -> Path:
        path = self.existing(name)
        if not path.is_file():
            raise _no_such(name)
        return path

    def entries(self, name: str, *, recursive: bool) -> list[api_pb2.FileEntry]:
        path = self.existing(name)
        if path.is_dir():
            found = [path / inner for inner in sorted(scan(path))]
            found = [p for p in found if recursive or p.parent == path]
        else:
            found = [path]
        return [self._entry(p) for p in found]

    def _entry(self, path: Path) -> api_pb2.FileEntry:
        state = path.lstat()
        kind = "link" if path.is_symlink() else "directory" if path.is_dir() else "file"
        return api_pb2.FileEntry(
            path=str(path.relative_to(self.directory)),
            type=_TYPES[kind],
            mtime=int(state.st_mtime),
            size=0 if kind == "directory" else state.st_size,
        )

    def check_upload(self, names: Iterable[str], *, overwrite: bool) -> None:
        """All files of a batch are refused, or none is."""
        for name in names:
            path = self.path(name)
            if path.is_dir() or (path.exists() and not overwrite):
                raise GRPCError(Status.ALREADY_EXISTS, f"'{name}' already exists")
            if any(parent.is_file() for parent in path.parents):
                raise GRPCError(Status.INVALID_ARGUMENT, f"'{name}' is below a file")

    def write(self, name: str, parts: Iterable[bytes], size: int, mode: int) -> None:
        """Its parts, and zeros up to its size."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.staging.mkdir(exist_ok=True)
        waiting = self.staging / new_id("upload")
        with waiting.open("wb") as file:
            for part in parts:
                file.write(part)
            file.truncate(size)
        waiting.chmod(mode & 0o777 or 0o644)
        waiting.replace(path)

    def remove(self, name: str, *, recursive: bool) -> None:
        path = self.existing(name)
        if path == self.directory:
            raise GRPCError(Status.INVALID_ARGUMENT, "The volume's root cannot be removed")
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif recursive:
            shutil.rmtree(path)
        else:
            raise GRPCError(Status.INVALID_ARGUMENT, f"'{name}' is a directory")

    def copy(self, names: Iterable[str], target: str, *, recursive: bool) -> None:
        """As `cp` does it."""
        sources, goal = [self.existing(name) for name in names], self.path(target)
        into = goal.is_dir() or target.endswith("/")
        if len(sources) > 1 and not into:
            raise GRPCError(Status.INVALID_ARGUMENT, f"'{target}' is not a directory")
        for source in sources:
            if source.is_dir() and not recursive:
                raise GRPCError(Status.INVALID_ARGUMENT, f"'{source.name}' is a directory")
            end = goal / source.name if into else goal
            for inner in [".", *(scan(source) if source.is_dir() else [])]:
                place(source / inner, end / inner, self.staging)

    def keep(self, path: Path) -> Path:
        """The file as it is now, whatever becomes of its name: for a download."""
        self.staging.mkdir(exist_ok=True)
        kept = self.staging / new_id("download")
        os.link(path.resolve(), kept)
        return kept


class VolumeStore:
    """`commits` counts those of containers, by volume id."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.volumes: dict[str, Volume] = {}
        self.ids: dict[tuple[str, str], str] = {}
        self.commits: collections.Counter[str] = collections.Counter()

    def need(self, volume_id: str) -> Volume:
        volume = self.volumes.get(volume_id)
        if volume is None:
            raise GRPCError(Status.NOT_FOUND, f"No volume {volume_id}")
        return volume

    def named(self, name: str, environment: str) -> Volume | None:
        volume_id = self.ids.get((environment or "main", name))
        return None if volume_id is None else self.volumes[volume_id]

    def create(
        self, name: str, environment: str, version: "api_pb2.VolumeFsVersion.ValueType"
    ) -> Volume:
        """A volume without a name is an ephemeral one."""
        volume_id = new_id("vo")
        volume = Volume(
            volume_id,
            name,
            version or api_pb2.VOLUME_FS_VERSION_V1,
            self.directory / volume_id,
        )
        volume.directory.mkdir(parents=True)
        self.volumes[volume_id] = volume
        if name:
            self.ids[environment or "main", name] = volume_id
        return volume

    def delete(self, volume: Volume) -> None:
        del self.volumes[volume.volume_id]
        self.ids = {key: value for key, value in self.ids.items() if value != volume.volume_id}
        shutil.rmtree(volume.directory)
