"""What functions are made of: images, mounts, secrets, blobs."""

import hashlib
from typing import TYPE_CHECKING

from grpclib import GRPCError, Status
from modal_proto import api_pb2

from modal_emulator.model import OK
from modal_emulator.rpc import unary
from modal_emulator.tokens import new_id

if TYPE_CHECKING:
    from modal_emulator.cloud import Cloud


class ObjectRpcs:
    def __init__(self, cloud: "Cloud") -> None:
        self.cloud = cloud

    # -- images --------------------------------------------------------------------------------
    @unary("ImageGetOrCreate")
    async def image(
        self, request: api_pb2.ImageGetOrCreateRequest
    ) -> api_pb2.ImageGetOrCreateResponse:
        """Remembered, never built."""
        content = request.image.SerializeToString(deterministic=True)
        image_id = f"im-{hashlib.sha256(content).hexdigest()[:20]}"
        self.cloud.images.requests[image_id] = request
        metadata = api_pb2.ImageMetadata(image_builder_version=request.builder_version)
        return api_pb2.ImageGetOrCreateResponse(image_id=image_id, result=OK, metadata=metadata)

    @unary("ImageFromId")
    async def image_from_id(
        self, request: api_pb2.ImageFromIdRequest
    ) -> api_pb2.ImageFromIdResponse:
        return api_pb2.ImageFromIdResponse(image_id=request.image_id)

    # -- mounts --------------------------------------------------------------------------------
    @unary("MountBatchedCheckExistence")
    async def mount_check(
        self, request: api_pb2.MountBatchedCheckExistenceRequest
    ) -> api_pb2.MountBatchedCheckExistenceResponse:
        known = self.cloud.images.files
        return api_pb2.MountBatchedCheckExistenceResponse(
            missing_sha256_hex_hashes=[h for h in request.sha256_hex_hashes if h not in known]
        )

    @unary("MountPutFile")
    async def mount_file(
        self, request: api_pb2.MountPutFileRequest
    ) -> api_pb2.MountPutFileResponse:
        files = self.cloud.images.files
        if (kind := request.WhichOneof("data_oneof")) is not None:
            inline = kind == "data"
            data = request.data if inline else self.cloud.blobs.data[request.data_blob_id]
            if hashlib.sha256(data).hexdigest() != request.sha256_hex:
                raise GRPCError(Status.INVALID_ARGUMENT, "sha256 mismatch")
            files[request.sha256_hex] = data
        return api_pb2.MountPutFileResponse(exists=request.sha256_hex in files)

    @unary("MountGetOrCreate")
    async def mount(
        self, request: api_pb2.MountGetOrCreateRequest
    ) -> api_pb2.MountGetOrCreateResponse:
        """A named mount is the platform's: the client package, or a standalone Python."""
        mount_id = new_id("mo")
        self.cloud.images.mounts[mount_id] = list(request.files)
        self.cloud.images.mount_names[mount_id] = request.deployment_name
        digest = hashlib.sha256()
        for file in request.files:
            digest.update(file.SerializeToString(deterministic=True))
        metadata = api_pb2.MountHandleMetadata(content_checksum_sha256_hex=digest.hexdigest())
        return api_pb2.MountGetOrCreateResponse(mount_id=mount_id, handle_metadata=metadata)

    # -- secrets -------------------------------------------------------------------------------
    @unary("SecretGetOrCreate")
    async def secret(
        self, request: api_pb2.SecretGetOrCreateRequest
    ) -> api_pb2.SecretGetOrCreateResponse:
        name = request.deployment_name
        key = (request.environment_name or "main", name)
        secret_id = self.cloud.secret_ids.get(key) if name else None
        if request.env_dict or request.object_creation_type:
            secret_id = secret_id or new_id("st")
            self.cloud.secrets[secret_id] = dict(request.env_dict)
            if name:
                self.cloud.secret_ids[key] = secret_id
        if secret_id is None:
            raise GRPCError(Status.NOT_FOUND, f"Secret '{name}' not found")
        missing = [k for k in request.required_keys if k not in self.cloud.secrets[secret_id]]
        if missing:
            message = f"Secret is missing key(s): {', '.join(missing)}"
            raise GRPCError(Status.NOT_FOUND, message)
        return api_pb2.SecretGetOrCreateResponse(
            secret_id=secret_id, metadata=api_pb2.SecretMetadata(name=name)
        )

    # -- blobs ---------------------------------------------------------------------------------
    @unary("BlobCreate")
    async def blob_create(self, _: api_pb2.BlobCreateRequest) -> api_pb2.BlobCreateResponse:
        blob_id = new_id("bl")
        url = self.cloud.blobs.url(blob_id)
        return api_pb2.BlobCreateResponse(
            blob_id=blob_id,
            upload_url=url,
            blob_ids=[blob_id],
            upload_urls=api_pb2.UploadUrlList(items=[url]),
        )

    @unary("BlobGet")
    async def blob_get(self, request: api_pb2.BlobGetRequest) -> api_pb2.BlobGetResponse:
        if request.blob_id not in self.cloud.blobs.data:
            raise GRPCError(Status.NOT_FOUND, f"No blob {request.blob_id}")
        return api_pb2.BlobGetResponse(download_url=self.cloud.blobs.url(request.blob_id))
