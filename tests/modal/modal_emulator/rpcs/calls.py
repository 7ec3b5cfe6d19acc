"""Calling functions: sending inputs, waiting for outputs, cancelling."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2

from modal_emulator.model import CANCELLED, Call, Input
from modal_emulator.rpc import streaming, unary
from modal_emulator.streams import follow
from modal_emulator.tokens import decode, encode, new_id

if TYPE_CHECKING:
    from modal_emulator.cloud import Cloud

T = TypeVar("T")


async def wait_for(call: Call, look: Callable[[], T], seconds: float) -> T:
    """What `look` finds, as soon as it finds something; or what it finds when time is up."""
    deadline = time.monotonic() + seconds
    async with call.changed:
        while not (found := look()) and (left := deadline - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left):
                    await call.changed.wait()
            except TimeoutError:
                break
        return found or look()


def start_call(cloud: "Cloud", call: Call) -> Call:
    cloud.calls[call.call_id] = call
    return call


def add_inputs(
    cloud: "Cloud", call: Call, items: Iterable[api_pb2.FunctionPutInputsItem]
) -> list[Input]:
    added = []
    for item in items:
        entry = Input(new_id("in"), call, item.idx, item.input)
        call.inputs[entry.input_id] = entry
        if call.cancelled:  # a map that was cancelled while its inputs were still coming
            cloud.spawn(call.publish(entry, CANCELLED))
        else:
            cloud.pool(call.function_id).enqueue(entry)
        added.append(entry)
    return added


def retry_input(cloud: "Cloud", token: str, payload: api_pb2.FunctionInput) -> Input:
    named = decode(token)
    entry = cloud.need_call(named["fc"]).inputs[named["input_id"]]
    entry.retry(payload)
    cloud.pool(entry.call.function_id).enqueue(entry)
    return entry


def outputs_after(call: Call, last_entry_id: str) -> list[api_pb2.FunctionGetOutputsItem]:
    """Entry ids are "N-0", N being the number of outputs up to that one."""
    return call.outputs[int((last_entry_id or "0-0").split("-")[0]) :]


class CallRpcs:
    def __init__(self, cloud: "Cloud") -> None:
        self.cloud = cloud

    def _put(
        self, call: Call, items: Iterable[api_pb2.FunctionPutInputsItem]
    ) -> list[api_pb2.FunctionPutInputsResponseItem]:
        return [
            api_pb2.FunctionPutInputsResponseItem(
                idx=entry.idx, input_id=entry.input_id, input_jwt=entry.token
            )
            for entry in add_inputs(self.cloud, call, items)
        ]

    @unary("FunctionMap")
    async def start(self, request: api_pb2.FunctionMapRequest) -> api_pb2.FunctionMapResponse:
        function = self.cloud.need_function(request.function_id)
        call = Call(request.function_id, request.function_call_invocation_type)
        start_call(self.cloud, call)
        return api_pb2.FunctionMapResponse(
            function_call_id=call.call_id,
            pipelined_inputs=self._put(call, request.pipelined_inputs),
            retry_policy=function.definition.retry_policy,
            function_call_jwt=encode(fc=call.call_id, function_id=request.function_id),
            sync_client_retries_enabled=True,
            max_inputs_outstanding=self.cloud.options.max_inputs_outstanding,
        )

    @unary("FunctionPutInputs")
    async def put_inputs(
        self, request: api_pb2.FunctionPutInputsRequest
    ) -> api_pb2.FunctionPutInputsResponse:
        call = self.cloud.need_call(request.function_call_id)
        return api_pb2.FunctionPutInputsResponse(inputs=self._put(call, request.inputs))

    @unary("FunctionFinishInputs")
    async def finish_inputs(self, _: api_pb2.FunctionFinishInputsRequest) -> Empty:
        return Empty()

    @unary("FunctionRetryInputs")
    async def retry_inputs(
        self, request: api_pb2.FunctionRetryInputsRequest
    ) -> api_pb2.FunctionRetryInputsResponse:
        entries = [retry_input(self.cloud, item.input_jwt, item.input) for item in request.inputs]
        return api_pb2.FunctionRetryInputsResponse(input_jwts=[e.token for e in entries])

    @unary("FunctionGetOutputs")
    async def outputs(
        self, request: api_pb2.FunctionGetOutputsRequest
    ) -> api_pb2.FunctionGetOutputsResponse:
        call = self.cloud.need_call(request.function_call_id)

        def look() -> list[api_pb2.FunctionGetOutputsItem]:
            found = outputs_after(call, request.last_entry_id)
            if not request.HasField("start_idx"):
                return found
            end = request.end_idx if request.HasField("end_idx") else request.start_idx
            # Only an input's newest attempt counts. The client keeps sending the first attempt's
            # token, so that cannot tell them apart.
            newest = {i: entry.retry_count for i, entry in call.inputs.items() if entry.done}
            return [
                item
                for item in found
                if request.start_idx <= item.idx <= end
                and newest.get(item.input_id) == item.retry_count
            ]

        found = await wait_for(call, look, request.timeout)
        return api_pb2.FunctionGetOutputsResponse(
            outputs=found,
            idxs=[item.idx for item in found],
            last_entry_id=f"{len(call.outputs)}-0",
            num_unfinished_inputs=call.unfinished,
        )

    @unary("FunctionCallCancel")
    async def cancel(self, request: api_pb2.FunctionCallCancelRequest) -> Empty:
        call = self.cloud.need_call(request.function_call_id)
        pool = self.cloud.pool(call.function_id)
        await pool.cancel(call, terminate_containers=request.terminate_containers)
        return Empty()

    @unary("FunctionCallFromId")
    async def from_id(
        self, request: api_pb2.FunctionCallFromIdRequest
    ) -> api_pb2.FunctionCallFromIdResponse:
        call = self.cloud.need_call(request.function_call_id)
        return api_pb2.FunctionCallFromIdResponse(
            function_call_id=call.call_id,
            num_inputs=len(call.inputs),
            metadata=api_pb2.FunctionCallHandleMetadata(
                function_id=call.function_id,
                app_id=self.cloud.need_function(call.function_id).app_id,
            ),
        )

    @streaming("FunctionCallGetDataOut")
    async def data_out(
        self, request: api_pb2.FunctionCallGetDataRequest
    ) -> AsyncIterator[api_pb2.DataChunk]:
        call = self.cloud.need_call(request.function_call_id or decode(request.attempt_token)["fc"])
        async for chunk in follow(call, call.data_out, request.last_index):
            yield chunk
