"""What of volumes and buckets one container sees."""

import asyncio
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from grpclib import GRPCError, Status
from modal_proto import api_pb2

from .sandbox import marked_processes
from .working_copy import WorkingCopy

if TYPE_CHECKING:
    from .cloud import Cloud


class Mounts:
    """A volume is mounted as a working copy, and so is a bucket that is read only."""

    def __init__(self, cloud: "Cloud", definition: api_pb2.Function, directory: Path) -> None:
        self.cloud, self.directory = cloud, directory
        self.places: dict[str, Path] = {}
        """The directory that is mounted at each path."""
        self.read_only: set[str] = set()
        self._copies: dict[str, WorkingCopy] = {}
        self._read_only_copies: list[WorkingCopy] = []
        for mount in definition.volume_mounts:
            volume = cloud.volumes.need(mount.volume_id)
            copy = WorkingCopy(volume.directory, directory / mount.volume_id)
            if mount.read_only:
                self.read_only.add(mount.mount_path)
            self._copies[mount.volume_id] = copy
            self.places[mount.mount_path] = copy.directory / mount.sub_path.lstrip("/")
        for number, bucket in enumerate(definition.cloud_bucket_mounts):
            source = cloud.bucket_directory(bucket.bucket_name) / bucket.key_prefix
            source.mkdir(parents=True, exist_ok=True)
            if bucket.read_only:
                self.read_only.add(bucket.mount_path)
                self._read_only_copies.append(WorkingCopy(source, directory / f"bucket-{number}"))
                source = self._read_only_copies[-1].directory
            self.places[bucket.mount_path] = source
        self._writable = {
            mount.volume_id for mount in definition.volume_mounts if not mount.read_only
        }

    async def fill(self) -> None:
        """A container starts, or is restored, with what is committed by then."""
        for volume_id, copy in self._copies.items():
            async with self.cloud.volumes.need(volume_id).lock:
                await asyncio.to_thread(copy.pull)
        for copy in self._read_only_copies:
            await asyncio.to_thread(copy.pull)
        for place in self.places.values():
            place.mkdir(parents=True, exist_ok=True)

    async def commit(self, volume_id: str) -> None:
        copy = self._mounted(volume_id)
        if volume_id in self._writable:
            async with self.cloud.volumes.need(volume_id).lock:
                await asyncio.to_thread(copy.push)

    async def commit_all(self) -> None:
        for volume_id in self._copies:
            await self.commit(volume_id)

    async def reload(self, volume_id: str, container: str) -> None:
        copy = self._mounted(volume_id)
        opened = await asyncio.to_thread(lambda: copy.opened_by(marked_processes(container)))
        if opened is not None:
            message = f"there are open files preventing the operation: '{opened}' of {volume_id}"
            raise GRPCError(Status.FAILED_PRECONDITION, message)
        async with self.cloud.volumes.need(volume_id).lock:
            await asyncio.to_thread(copy.pull)

    def _mounted(self, volume_id: str) -> WorkingCopy:
        if volume_id not in self._copies:
            message = f"Volume {volume_id} is not mounted in this container"
            raise GRPCError(Status.NOT_FOUND, message)
        return self._copies[volume_id]

    def clear(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
