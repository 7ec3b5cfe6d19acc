"""Deploying functions and classes, and looking them up."""

from typing import TYPE_CHECKING

from grpclib import GRPCError, Status
from modal_proto import api_pb2

from modal_emulator import definitions
from modal_emulator.model import Function
from modal_emulator.rpc import unary
from modal_emulator.tokens import new_id

if TYPE_CHECKING:
    from modal_emulator.cloud import Cloud


class FunctionRpcs:
    def __init__(self, cloud: "Cloud") -> None:
        self.cloud = cloud

    def _get_or_make(self, existing_id: str, app_id: str) -> Function:
        function_id = existing_id or new_id("fu")
        return self.cloud.functions.setdefault(function_id, Function(function_id, app_id))

    @unary("FunctionPrecreate")
    async def precreate(
        self, request: api_pb2.FunctionPrecreateRequest
    ) -> api_pb2.FunctionPrecreateResponse:
        function = self._get_or_make(request.existing_function_id, request.app_id)
        function.precreate = request
        return api_pb2.FunctionPrecreateResponse(
            function_id=function.function_id, handle_metadata=self.cloud.metadata(function)
        )

    @unary("FunctionCreate")
    async def create(
        self, request: api_pb2.FunctionCreateRequest
    ) -> api_pb2.FunctionCreateResponse:
        function = self._get_or_make(request.existing_function_id, request.app_id)
        function.request, function.definition = request, definitions.chosen(request)
        function.definition_id, function.created = new_id("de"), True
        self.cloud.created.append(request)
        await self.cloud.web.open(function)
        return api_pb2.FunctionCreateResponse(
            function_id=function.function_id,
            function=function.definition,
            function_data=definitions.function_data(function.definition),
            handle_metadata=self.cloud.metadata(function),
        )

    @unary("ClassCreate")
    async def create_class(
        self, request: api_pb2.ClassCreateRequest
    ) -> api_pb2.ClassCreateResponse:
        return api_pb2.ClassCreateResponse(
            class_id=request.existing_class_id or new_id("cs"),
            handle_metadata=api_pb2.ClassHandleMetadata(),
        )

    @unary("ClassGet")
    async def get_class(self, request: api_pb2.ClassGetRequest) -> api_pb2.ClassGetResponse:
        app = self.cloud.need_app(request.app_name, request.environment_name)
        if request.object_tag not in app.class_ids:
            message = f"No Cls '{request.object_tag}' in app '{request.app_name}'"
            raise GRPCError(Status.NOT_FOUND, message)
        return api_pb2.ClassGetResponse(
            class_id=app.class_ids[request.object_tag],
            handle_metadata=api_pb2.ClassHandleMetadata(),
        )

    @unary("FunctionGet")
    async def get(self, request: api_pb2.FunctionGetRequest) -> api_pb2.FunctionGetResponse:
        app = self.cloud.need_app(request.app_name, request.environment_name)
        if request.object_tag not in app.function_ids:
            message = f"No Function '{request.object_tag}' in app '{request.app_name}'"
            raise GRPCError(Status.NOT_FOUND, message)
        function = self.cloud.functions[app.function_ids[request.object_tag]]
        return api_pb2.FunctionGetResponse(
            function_id=function.function_id,
            handle_metadata=self.cloud.metadata(function),
            function=definitions.function_data(function.definition),
        )

    @unary("FunctionGetById")
    async def get_by_id(
        self, request: api_pb2.FunctionGetByIdRequest
    ) -> api_pb2.FunctionGetByIdResponse:
        function = self.cloud.need_function(request.function_id)
        return api_pb2.FunctionGetByIdResponse(
            handle_metadata=self.cloud.metadata(function),
            function=definitions.function_data(function.definition),
        )

    @unary("FunctionBindParams")
    async def bind(
        self, request: api_pb2.FunctionBindParamsRequest
    ) -> api_pb2.FunctionBindParamsResponse:
        function = self.cloud.bind(request)
        return api_pb2.FunctionBindParamsResponse(
            bound_function_id=function.function_id, handle_metadata=self.cloud.metadata(function)
        )

    @unary("FunctionGetCurrentStats")
    async def stats(self, request: api_pb2.FunctionGetCurrentStatsRequest) -> api_pb2.FunctionStats:
        pool = self.cloud.pool(request.function_id)
        return api_pb2.FunctionStats(backlog=len(pool.queue), num_total_tasks=len(pool.containers))

    @unary("FunctionUpdateSchedulingParams")
    async def update_scheduling(
        self, request: api_pb2.FunctionUpdateSchedulingParamsRequest
    ) -> api_pb2.FunctionUpdateSchedulingParamsResponse:
        pool = self.cloud.pool(request.function_id)
        function = pool.function
        function.autoscaler.MergeFrom(request.settings)
        function.definition.autoscaler_settings.MergeFrom(request.settings)
        pool.definition.autoscaler_settings.MergeFrom(request.settings)
        await pool.scale()
        return api_pb2.FunctionUpdateSchedulingParamsResponse(
            current_settings=function.definition.autoscaler_settings
        )
