"""What only containers call: inputs, outputs, heartbeats, checkpoints, commits."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from modal_emulator.rpc import streaming, unary
from modal_emulator.streams import follow
from modal_emulator.tokens import decode

if TYPE_CHECKING:
    from modal_emulator.cloud import Cloud
    from modal_emulator.container import Container
    from modal_emulator.model import Call

_HEARTBEAT_POLL = 10.0


class ContainerRpcs:
    def __init__(self, cloud: "Cloud", container: "Container") -> None:
        self.cloud, self.container = cloud, container

    @unary("ContainerHello")
    async def hello(self, _: Empty) -> Empty:
        self.container.mark("hello")
        return Empty()

    @unary("ContainerHeartbeat")
    async def heartbeat(
        self, _: api_pb2.ContainerHeartbeatRequest
    ) -> api_pb2.ContainerHeartbeatResponse:
        """A long poll, answered early when there is something to cancel."""
        try:
            async with asyncio.timeout(_HEARTBEAT_POLL):
                input_ids = await self.container.cancellations.get()
        except TimeoutError:
            return api_pb2.ContainerHeartbeatResponse()
        event = api_pb2.CancelInputEvent(input_ids=input_ids)
        return api_pb2.ContainerHeartbeatResponse(cancel_input_event=event)

    @unary("FunctionGetInputs")
    async def get_inputs(
        self, request: api_pb2.FunctionGetInputsRequest
    ) -> api_pb2.FunctionGetInputsResponse:
        self.container.on_ready()
        taken = await self.container.pool.take(
            self.container, max(1, request.batch_max_size), request.batch_linger_ms / 1000
        )
        if taken is None:
            items = [api_pb2.FunctionGetInputsItem(kill_switch=True)]
            return api_pb2.FunctionGetInputsResponse(inputs=items)
        items = [
            api_pb2.FunctionGetInputsItem(
                input_id=entry.input_id,
                input=entry.payload,
                function_call_id=entry.call.call_id,
                function_call_invocation_type=entry.call.invocation,
                retry_count=entry.retry_count,
                function_map_idx=entry.idx,
            )
            for entry in taken
        ]
        return api_pb2.FunctionGetInputsResponse(inputs=items)

    @unary("FunctionPutOutputs")
    async def put_outputs(self, request: api_pb2.FunctionPutOutputsRequest) -> Empty:
        for item in request.outputs:
            await self.container.pool.finish(
                item.input_id,
                item.retry_count,
                item.result,
                data_format=item.data_format,
                started_at=item.input_started_at,
            )
        return Empty()

    @unary("FunctionGetDynamicConcurrency")
    async def concurrency(
        self, request: api_pb2.FunctionGetDynamicConcurrencyRequest
    ) -> api_pb2.FunctionGetDynamicConcurrencyResponse:
        """The target, unless inputs are waiting: then the most that is allowed."""
        waiting = bool(self.container.pool.queue)
        return api_pb2.FunctionGetDynamicConcurrencyResponse(
            concurrency=request.max_concurrency if waiting else request.target_concurrency
        )

    @unary("ContainerCheckpoint")
    async def checkpoint(self, request: api_pb2.ContainerCheckpointRequest) -> Empty:
        if request.checkpoint_id != self.container.checkpoint_id:
            raise GRPCError(Status.INVALID_ARGUMENT, f"Unknown checkpoint {request.checkpoint_id}")
        self.cloud.spawn(self.container.restore())
        return Empty()

    @unary("VolumeCommit")
    async def volume_commit(
        self, request: api_pb2.VolumeCommitRequest
    ) -> api_pb2.VolumeCommitResponse:
        """The client reloads after it."""
        await self.container.mounts.commit(request.volume_id)
        self.cloud.volumes.commits[request.volume_id] += 1
        return api_pb2.VolumeCommitResponse(skip_reload=False)

    @unary("VolumeReload")
    async def volume_reload(self, request: api_pb2.VolumeReloadRequest) -> Empty:
        await self.container.mounts.reload(request.volume_id, self.container.name)
        return Empty()

    @unary("ContainerStop")
    async def stop(self, _: api_pb2.ContainerStopRequest) -> api_pb2.ContainerStopResponse:
        """Behind `stop_fetching_inputs`: no more inputs, the container ends when it is idle."""
        self.container.stopping = True
        self.container.mark("stop-fetching")
        self.container.pool.wake()
        self.cloud.spawn(self.container.pool.scale())
        return api_pb2.ContainerStopResponse()

    @unary("TaskResult")
    async def task_result(self, request: api_pb2.TaskResultRequest) -> Empty:
        """A lifecycle hook or an import raised; the process ends by itself."""
        self.container.failure = request.result
        self.container.mark("task-result")
        return Empty()

    def _call(
        self,
        request: api_pb2.FunctionCallGetDataRequest | api_pb2.FunctionCallPutDataRequest,
    ) -> "Call":
        call_id = request.function_call_id or decode(request.attempt_token)["fc"]
        return self.cloud.need_call(call_id)

    @streaming("FunctionCallGetDataIn")
    async def data_in(
        self, request: api_pb2.FunctionCallGetDataRequest
    ) -> AsyncIterator[api_pb2.DataChunk]:
        call = self._call(request)
        async for chunk in follow(call, call.data_in, request.last_index):
            yield chunk

    @unary("FunctionCallPutDataOut")
    async def put_data_out(self, request: api_pb2.FunctionCallPutDataRequest) -> Empty:
        call = self._call(request)
        call.data_out.extend(request.data_chunks)
        await call.notify()
        return Empty()
