"""Greeting, environments, and the life of an app."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from modal_emulator.model import App
from modal_emulator.rpc import streaming, unary
from modal_emulator.tokens import encode, new_id

if TYPE_CHECKING:
    from modal_emulator.cloud import Cloud

IMAGE_BUILDER_VERSION = "2025.06"


class AppRpcs:
    def __init__(self, cloud: "Cloud") -> None:
        self.cloud = cloud

    @unary("ClientHello")
    async def hello(self, _: Empty) -> api_pb2.ClientHelloResponse:
        return api_pb2.ClientHelloResponse()

    @unary("AuthTokenGet")
    async def auth_token(self, _: api_pb2.AuthTokenGetRequest) -> api_pb2.AuthTokenGetResponse:
        return api_pb2.AuthTokenGetResponse(token=encode(exp=time.time() + 1200))

    @unary("WorkspaceNameLookup")
    async def workspace(self, _: Empty) -> api_pb2.WorkspaceNameLookupResponse:
        return api_pb2.WorkspaceNameLookupResponse(workspace_name="emulated", username="emulated")

    @unary("EnvironmentGetOrCreate")
    async def environment(
        self, request: api_pb2.EnvironmentGetOrCreateRequest
    ) -> api_pb2.EnvironmentGetOrCreateResponse:
        name = request.deployment_name or "main"
        settings = api_pb2.EnvironmentSettings(image_builder_version=IMAGE_BUILDER_VERSION)
        return api_pb2.EnvironmentGetOrCreateResponse(
            environment_id=f"en-{name}",
            metadata=api_pb2.EnvironmentMetadata(name=name, settings=settings),
        )

    @unary("AppGetByDeploymentName")
    async def get_by_name(
        self, request: api_pb2.AppGetByDeploymentNameRequest
    ) -> api_pb2.AppGetByDeploymentNameResponse:
        app = self.cloud.deployed_app(request.name, request.environment_name)
        return api_pb2.AppGetByDeploymentNameResponse(app_id=app.app_id if app else "")

    @unary("AppCreate")
    async def create(self, request: api_pb2.AppCreateRequest) -> api_pb2.AppCreateResponse:
        app = App(
            app_id=new_id("ap"),
            name=request.description,
            environment=request.environment_name or "main",
            state=request.app_state,
        )
        self.cloud.apps[app.app_id] = app
        page = f"http://emulated/{app.app_id}"
        return api_pb2.AppCreateResponse(
            app_id=app.app_id, app_page_url=page, app_logs_url=f"{page}/logs"
        )

    @unary("AppGetLayout")
    async def layout(self, request: api_pb2.AppGetLayoutRequest) -> api_pb2.AppGetLayoutResponse:
        return api_pb2.AppGetLayoutResponse(app_layout=self.cloud.layout(request.app_id))

    @unary("AppPublish")
    async def publish(self, request: api_pb2.AppPublishRequest) -> api_pb2.AppPublishResponse:
        app = self.cloud.apps[request.app_id]
        app.function_ids, app.class_ids = dict(request.function_ids), dict(request.class_ids)
        app.state, app.version = request.app_state, app.version + 1
        app.name, app.tags = request.name or app.name, dict(request.tags)
        await self.cloud.published(app)
        return api_pb2.AppPublishResponse(
            url=f"http://emulated/{app.name}", deployed_at=time.time()
        )

    @unary("AppGetOrCreate")
    async def look_up(
        self, request: api_pb2.AppGetOrCreateRequest
    ) -> api_pb2.AppGetOrCreateResponse:
        """`App.lookup` of a deployed app; one that is missing is not created here."""
        app = self.cloud.deployed_app(request.app_name, request.environment_name)
        if app is None:
            raise GRPCError(Status.NOT_FOUND, f"App '{request.app_name}' not found")
        return api_pb2.AppGetOrCreateResponse(app_id=app.app_id)

    @unary("AppGetTags")
    async def tags(self, request: api_pb2.AppGetTagsRequest) -> api_pb2.AppGetTagsResponse:
        return api_pb2.AppGetTagsResponse(tags=self.cloud.apps[request.app_id].tags)

    @unary("AppHeartbeat")
    async def heartbeat(self, _: api_pb2.AppHeartbeatRequest) -> Empty:
        return Empty()

    @unary("AppClientDisconnect")
    async def disconnect(self, request: api_pb2.AppClientDisconnectRequest) -> Empty:
        app = self.cloud.apps[request.app_id]
        if app.state != api_pb2.APP_STATE_DEPLOYED:
            await self.cloud.stop_app(app)
        return Empty()

    @unary("AppStop")
    async def stop(self, request: api_pb2.AppStopRequest) -> Empty:
        await self.cloud.stop_app(self.cloud.apps[request.app_id])
        return Empty()

    @streaming("AppGetLogs")
    async def logs(
        self, request: api_pb2.AppGetLogsRequest
    ) -> AsyncIterator[api_pb2.TaskLogsBatch]:
        """Ends with the app; the containers' own output is in their log files."""
        while self.cloud.apps[request.app_id].state != api_pb2.APP_STATE_STOPPED:
            await asyncio.sleep(0.05)
        yield api_pb2.TaskLogsBatch(app_done=True)
