"""The emulated platform itself: its state, its servers, and the services that speak for it."""

import asyncio
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web
from google.protobuf.message import Message
from grpclib import GRPCError, Status
from modal_proto import api_grpc, api_pb2

from . import definitions
from .blobs import BlobStore
from .endpoint import Endpoint
from .images import ImageStore
from .model import App, Call, Function
from .options import Options
from .pool import Pool
from .recorder import Recorder
from .rpc import Stream, service
from .rpcs import CLIENT_RPCS, ContainerRpcs
from .tokens import new_id
from .volume_blocks import BlockStore
from .volumes import VolumeStore
from .web import WebDoor

if TYPE_CHECKING:
    from .container import Container

T = TypeVar("T")


class Cloud:
    """Belongs to one event loop; `emulator.Emulator` is the door for tests."""

    def __init__(self, directory: Path, options: Options) -> None:
        self.directory, self.options = directory, options
        self.apps: dict[str, App] = {}
        self.functions: dict[str, Function] = {}
        self.calls: dict[str, Call] = {}
        self.pools: dict[str, Pool] = {}
        self.images, self.blobs, self.recorder = ImageStore(), BlobStore(), Recorder()
        self.secrets: dict[str, dict[str, str]] = {}
        self.secret_ids: dict[tuple[str, str], str] = {}
        self.volumes, self.blocks = VolumeStore(directory / "volumes"), BlockStore()
        self.created: list[api_pb2.FunctionCreateRequest] = []
        self.errors: list[BaseException] = []
        self.restores_allowed = asyncio.Event()
        self.restores_allowed.set()
        self.web = WebDoor(self)
        self.server_url = ""
        self._server: Endpoint | None = None
        self._runners: list[web.AppRunner] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- life ----------------------------------------------------------------------------------
    async def start(self) -> None:
        self._server = Endpoint(self._client_service())
        # By host and port: on a ready socket asyncio leaves Nagle's algorithm on (90 ms a call).
        await self._server.start("127.0.0.1", 0)
        self.server_url = f"http://127.0.0.1:{self._server.port}"
        self.blobs.base_url = await self.listen(self.blobs.application())
        self.blocks.base_url = await self.listen(self.blocks.application())

    async def listen(self, application: web.Application) -> str:
        """Serves an HTTP application on a free loopback port; returns its address."""
        runner = web.AppRunner(
            application, access_log=None, handler_cancellation=True, shutdown_timeout=0.5
        )
        await runner.setup()
        self._runners.append(runner)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def close(self) -> None:
        for pool in self.pools.values():
            pool.stopped = True
        alive = [c for pool in self.pools.values() for c in pool.containers]
        await asyncio.gather(*[c.kill() for c in alive])
        if self._server is not None:
            await self._server.hang_up()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for runner in self._runners:
            await runner.cleanup()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.errors.append(error)

    # -- services ------------------------------------------------------------------------------
    def _client_service(self) -> api_grpc.ModalClientBase:
        async def admit(name: str, message: Message, stream: Stream, implemented: bool) -> None:
            metadata: Mapping[str, Any] = stream.metadata or {}
            given = (metadata.get("x-modal-token-id"), metadata.get("x-modal-token-secret"))
            if given != self.options.credentials and (name != "ClientHello" or any(given)):
                raise GRPCError(Status.UNAUTHENTICATED, "Token validation failed")
            await self.recorder.admit("client", name, message, implemented=implemented)

        return service([group(self) for group in CLIENT_RPCS], admit)

    def container_service(self, container: "Container") -> api_grpc.ModalClientBase:
        """What one container may call: all that clients may, and its own task's calls."""

        async def admit(name: str, message: Message, stream: Stream, implemented: bool) -> None:
            await self.recorder.admit(container.task_id, name, message, implemented=implemented)

        groups = [group(self) for group in CLIENT_RPCS]
        return service([*groups, ContainerRpcs(self, container)], admit)

    # -- lookups -------------------------------------------------------------------------------
    def deployed_app(self, name: str, environment: str) -> App | None:
        for app in self.apps.values():
            if (app.name, app.environment, app.state) == (
                name,
                environment or "main",
                api_pb2.APP_STATE_DEPLOYED,
            ):
                return app
        return None

    def need_app(self, name: str, environment: str) -> App:
        app = self.deployed_app(name, environment)
        if app is None:
            message = f"No app '{name}' in environment '{environment or 'main'}'"
            raise GRPCError(Status.NOT_FOUND, message)
        return app

    def need_function(self, function_id: str) -> Function:
        function = self.functions.get(function_id)
        if function is None or not function.created:
            raise GRPCError(Status.NOT_FOUND, f"No function {function_id}")
        return function

    def need_call(self, call_id: str) -> Call:
        call = self.calls.get(call_id)
        if call is None:
            raise GRPCError(Status.NOT_FOUND, f"No function call {call_id}")
        return call

    def pool(self, function_id: str) -> Pool:
        if function_id not in self.pools:
            self.pools[function_id] = Pool(self, self.need_function(function_id))
        return self.pools[function_id]

    def bucket_directory(self, name: str) -> Path:
        return self.directory / "buckets" / name

    # -- functions -----------------------------------------------------------------------------
    def definition(self, function: Function) -> api_pb2.Function:
        base = self.functions[function.base_id] if function.base_id else function
        result = definitions.with_options(base.definition, function.options)
        result.autoscaler_settings.MergeFrom(function.autoscaler)
        return result

    def bind(self, request: api_pb2.FunctionBindParamsRequest) -> Function:
        """The variant of a class for some parameters and options: a pool of its own."""
        base = self.need_function(request.function_id)
        options = request.function_options.SerializeToString(deterministic=True)
        binding = f"{base.function_id}/{request.serialized_params.hex()}/{options.hex()}"
        for function in self.functions.values():
            if function.binding == binding:
                function.definition = self.definition(function)
                return function
        variant = Function(
            new_id("fu"),
            base.app_id,
            created=True,
            request=base.request,
            definition_id=base.definition_id,
            base_id=base.function_id,
            binding=binding,
            serialized_params=request.serialized_params,
            options=request.function_options,
        )
        variant.definition = self.definition(variant)
        self.functions[variant.function_id] = variant
        return variant

    def metadata(self, function: Function) -> api_pb2.FunctionHandleMetadata:
        base = self.functions[function.base_id] if function.base_id else function
        return definitions.handle_metadata(function, base.web_urls)

    def layout(self, app_id: str) -> api_pb2.AppLayout:
        app = self.apps[app_id]
        metadata = {i: self.metadata(self.functions[i]) for i in app.function_ids.values()}
        volumes = {i: volume.metadata for i, volume in self.volumes.volumes.items()}
        return definitions.layout(app, self.functions, metadata, volumes)

    def escalation_limit(self, app_id: str) -> int | None:
        """Failed starts after which waiting calls fail; None if they wait on."""
        if self.apps[app_id].state == api_pb2.APP_STATE_EPHEMERAL:
            return self.options.ephemeral_crashes_until_escalation
        return self.options.crashes_until_escalation

    # -- deployments ---------------------------------------------------------------------------
    async def published(self, app: App) -> None:
        """New versions of functions replace the containers of the old ones, and their settings of
        the autoscaler those that were set meanwhile."""
        for function in self.functions.values():
            if function.app_id == app.app_id:
                function.autoscaler.Clear()
        for pool in list(self.pools.values()):
            if pool.function.app_id != app.app_id:
                continue
            await pool.drain()
        for function_id in app.function_ids.values():
            settings = self.functions[function_id].definition.autoscaler_settings
            if settings.min_containers:
                await self.pool(function_id).scale()

    async def stop_app(self, app: App) -> None:
        app.state = api_pb2.APP_STATE_STOPPED
        pools = [pool for pool in self.pools.values() if pool.function.app_id == app.app_id]
        await asyncio.gather(*[pool.stop(self.options.stop_grace) for pool in pools])
