"""The newer way to call functions: attempts, which the client itself retries when they are lost."""

from typing import TYPE_CHECKING

from modal_proto import api_pb2

from modal_emulator.model import Call
from modal_emulator.rpc import unary
from modal_emulator.tokens import decode, encode

from .calls import add_inputs, outputs_after, retry_input, start_call, wait_for

if TYPE_CHECKING:
    from modal_emulator.cloud import Cloud


class InputPlaneRpcs:
    def __init__(self, cloud: "Cloud") -> None:
        self.cloud = cloud

    @unary("AttemptStart")
    async def start(self, request: api_pb2.AttemptStartRequest) -> api_pb2.AttemptStartResponse:
        function = self.cloud.need_function(request.function_id)
        call = start_call(self.cloud, Call(request.function_id))
        call.client_retries = True
        entry = add_inputs(self.cloud, call, [request.input])[0]
        return api_pb2.AttemptStartResponse(
            attempt_token=entry.token, retry_policy=function.definition.retry_policy
        )

    @unary("AttemptRetry")
    async def retry(self, request: api_pb2.AttemptRetryRequest) -> api_pb2.AttemptRetryResponse:
        entry = retry_input(self.cloud, request.attempt_token, request.input.input)
        return api_pb2.AttemptRetryResponse(attempt_token=entry.token)

    @unary("AttemptAwait")
    async def wait(self, request: api_pb2.AttemptAwaitRequest) -> api_pb2.AttemptAwaitResponse:
        named = decode(request.attempt_token)
        call = self.cloud.need_call(named["fc"])

        def look() -> list[api_pb2.FunctionGetOutputsItem]:
            attempt = (named["input_id"], named["retry_count"])
            return [o for o in call.outputs if (o.input_id, o.retry_count) == attempt]

        found = await wait_for(call, look, request.timeout_secs)
        return api_pb2.AttemptAwaitResponse(output=found[0] if found else None)

    @unary("MapStartOrContinue")
    async def map(
        self, request: api_pb2.MapStartOrContinueRequest
    ) -> api_pb2.MapStartOrContinueResponse:
        function = self.cloud.need_function(request.function_id)
        if request.map_token:
            call = self.cloud.need_call(decode(request.map_token)["fc"])
        else:
            call = start_call(self.cloud, Call(request.function_id))
            call.client_retries = True
        entries = [
            retry_input(self.cloud, item.attempt_token, item.input.input)
            if item.attempt_token
            else add_inputs(self.cloud, call, [item.input])[0]
            for item in request.items
        ]
        return api_pb2.MapStartOrContinueResponse(
            map_token=encode(fc=call.call_id),
            function_id=request.function_id,
            function_call_id=call.call_id,
            max_inputs_outstanding=self.cloud.options.max_inputs_outstanding,
            attempt_tokens=[entry.token for entry in entries],
            retry_policy=function.definition.retry_policy,
        )

    @unary("MapAwait")
    async def map_wait(self, request: api_pb2.MapAwaitRequest) -> api_pb2.MapAwaitResponse:
        call_id = request.function_call_id or decode(request.map_token)["fc"]
        call = self.cloud.need_call(call_id)
        found = await wait_for(
            call, lambda: outputs_after(call, request.last_entry_id), request.timeout
        )
        return api_pb2.MapAwaitResponse(outputs=found, last_entry_id=f"{len(call.outputs)}-0")

    @unary("MapCheckInputs")
    async def map_check(
        self, request: api_pb2.MapCheckInputsRequest
    ) -> api_pb2.MapCheckInputsResponse:
        return api_pb2.MapCheckInputsResponse(lost=[False] * len(request.attempt_tokens))
