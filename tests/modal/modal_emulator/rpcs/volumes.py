"""Volumes as clients see them: by name, and file by file. Commits and reloads are containers'."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from modal_emulator.rpc import streaming, unary
from modal_emulator.volume_blocks import BLOCK_SIZE

if TYPE_CHECKING:
    from modal_emulator.cloud import Cloud


class VolumeRpcs:
    def __init__(self, cloud: "Cloud") -> None:
        self.cloud, self.store = cloud, cloud.volumes

    # -- volumes -------------------------------------------------------------------------------
    @unary("VolumeGetOrCreate")
    async def get_or_create(
        self, request: api_pb2.VolumeGetOrCreateRequest
    ) -> api_pb2.VolumeGetOrCreateResponse:
        name, how = request.deployment_name, request.object_creation_type
        volume = self.store.named(name, request.environment_name) if name else None
        if volume is None and how == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
            raise GRPCError(Status.NOT_FOUND, f"Volume '{name}' not found")
        if volume is not None and how == api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
            raise GRPCError(Status.ALREADY_EXISTS, f"Volume '{name}' already exists")
        if volume is None:
            volume = self.store.create(name, request.environment_name, request.version)
        return api_pb2.VolumeGetOrCreateResponse(
            volume_id=volume.volume_id, version=volume.version, metadata=volume.metadata
        )

    @unary("VolumeGetById")
    async def get_by_id(
        self, request: api_pb2.VolumeGetByIdRequest
    ) -> api_pb2.VolumeGetByIdResponse:
        volume = self.store.need(request.volume_id)
        return api_pb2.VolumeGetByIdResponse(volume_id=volume.volume_id, metadata=volume.metadata)

    @unary("VolumeHeartbeat")
    async def heartbeat(self, _: api_pb2.VolumeHeartbeatRequest) -> Empty:
        return Empty()

    @unary("VolumeDelete")
    async def delete(self, request: api_pb2.VolumeDeleteRequest) -> Empty:
        self.store.delete(self.store.need(request.volume_id))
        return Empty()

    # -- reading -------------------------------------------------------------------------------
    @streaming("VolumeListFiles")
    async def list_files(
        self, request: api_pb2.VolumeListFilesRequest
    ) -> AsyncIterator[api_pb2.VolumeListFilesResponse]:
        volume = self.store.need(request.volume_id)
        entries = volume.entries(request.path, recursive=request.recursive)
        yield api_pb2.VolumeListFilesResponse(entries=entries)

    @streaming("VolumeListFiles2")
    async def list_files_2(
        self, request: api_pb2.VolumeListFiles2Request
    ) -> AsyncIterator[api_pb2.VolumeListFiles2Response]:
        volume = self.store.need(request.volume_id)
        entries = volume.entries(request.path, recursive=request.recursive)
        yield api_pb2.VolumeListFiles2Response(entries=entries)

    @unary("VolumeGetFile2")
    async def get_file(
        self, request: api_pb2.VolumeGetFile2Request
    ) -> api_pb2.VolumeGetFile2Response:
        volume = self.store.need(request.volume_id)
        kept = volume.keep(volume.file(request.path))
        size = kept.stat().st_size
        start = min(request.start, size)
        length = min(request.len or size, size - start)
        return api_pb2.VolumeGetFile2Response(
            get_urls=self.cloud.blocks.download_urls(kept, start, length),
            size=size,
            start=start,
            len=length,
        )

    # -- writing -------------------------------------------------------------------------------
    @unary("VolumePutFiles")
    async def put_files(self, request: api_pb2.VolumePutFilesRequest) -> Empty:
        volume, contents = self.store.need(request.volume_id), self.cloud.images.files
        async with volume.lock:
            names = [file.filename for file in request.files]
            overwrite = not request.disallow_overwrite_existing_files
            volume.check_upload(names, overwrite=overwrite)
            for file in request.files:
                data = contents[file.sha256_hex]
                await asyncio.to_thread(volume.write, file.filename, [data], len(data), file.mode)
        return Empty()

    @unary("VolumePutFiles2")
    async def put_files_2(
        self, request: api_pb2.VolumePutFiles2Request
    ) -> api_pb2.VolumePutFiles2Response:
        volume, known = self.store.need(request.volume_id), self.cloud.blocks.blocks
        response = api_pb2.VolumePutFiles2Response()
        wanted: set[str] = set()
        for file_index, file in enumerate(request.files):
            for block_index, block in enumerate(file.blocks):
                digest = block.contents_sha256.hex()
                if digest not in known and digest not in wanted:
                    wanted.add(digest)
                    url = self.cloud.blocks.upload_url(digest)
                    response.missing_blocks.add(
                        file_index=file_index, block_index=block_index, put_url=url
                    )
        async with volume.lock:
            names = [file.path for file in request.files]
            overwrite = not request.disallow_overwrite_existing_files
            volume.check_upload(names, overwrite=overwrite)
            if not wanted:
                for file in request.files:
                    parts = [
                        known[b.contents_sha256.hex()].ljust(BLOCK_SIZE, b"\0") for b in file.blocks
                    ]
                    await asyncio.to_thread(volume.write, file.path, parts, file.size, file.mode)
        return response

    @unary("VolumeRemoveFile")
    async def remove_file(self, request: api_pb2.VolumeRemoveFileRequest) -> Empty:
        return await self._remove(request.volume_id, request.path, recursive=request.recursive)

    @unary("VolumeRemoveFile2")
    async def remove_file_2(self, request: api_pb2.VolumeRemoveFile2Request) -> Empty:
        return await self._remove(request.volume_id, request.path, recursive=request.recursive)

    async def _remove(self, volume_id: str, path: str, *, recursive: bool) -> Empty:
        volume = self.store.need(volume_id)
        async with volume.lock:
            volume.remove(path, recursive=recursive)
        return Empty()

    @unary("VolumeCopyFiles")
    async def copy_files(self, request: api_pb2.VolumeCopyFilesRequest) -> Empty:
        return await self._copy(request)

    @unary("VolumeCopyFiles2")
    async def copy_files_2(self, request: api_pb2.VolumeCopyFiles2Request) -> Empty:
        return await self._copy(request)

    async def _copy(
        self, request: api_pb2.VolumeCopyFilesRequest | api_pb2.VolumeCopyFiles2Request
    ) -> Empty:
        volume = self.store.need(request.volume_id)
        async with volume.lock:
            volume.copy(request.src_paths, request.dst_path, recursive=request.recursive)
        return Empty()
