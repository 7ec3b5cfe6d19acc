"""What the control plane remembers: apps, functions, calls and their inputs."""

import asyncio
import time
from dataclasses import dataclass, field

from modal_proto import api_pb2

from .tokens import encode, new_id

Result = api_pb2.GenericResult

OK = Result(status=Result.GENERIC_STATUS_SUCCESS)
CANCELLED = Result(status=Result.GENERIC_STATUS_TERMINATED, exception="Function call was cancelled")
STOPPED = Result(status=Result.GENERIC_STATUS_TERMINATED, exception="App was stopped")


@dataclass
class App:
    app_id: str
    name: str
    environment: str
    state: "api_pb2.AppState.ValueType"
    function_ids: dict[str, str] = field(default_factory=dict)
    class_ids: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    version: int = 0


@dataclass
class Function:
    """A deployed function, or a variant of one, bound to parameters or options."""

    function_id: str
    app_id: str
    definition: api_pb2.Function = field(default_factory=api_pb2.Function)
    created: bool = False
    request: api_pb2.FunctionCreateRequest | None = None
    precreate: api_pb2.FunctionPrecreateRequest | None = None
    definition_id: str = ""
    base_id: str = ""
    binding: str = ""
    serialized_params: bytes = b""
    options: api_pb2.FunctionOptions | None = None
    autoscaler: api_pb2.AutoscalerSettings = field(default_factory=api_pb2.AutoscalerSettings)
    """What `update_autoscaler` has set since the last deployment."""
    web_urls: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.definition.function_name


@dataclass(eq=False)
class Input:
    input_id: str
    call: "Call"
    idx: int
    payload: api_pb2.FunctionInput
    retry_count: int = 0
    lost_containers: int = 0
    done: bool = False
    cancelled: bool = False
    watchdog: asyncio.Task[None] | None = None

    @property
    def token(self) -> str:
        """Names this attempt; the client sends it back to retry or await it."""
        return encode(
            idx=self.idx, input_id=self.input_id, fc=self.call.call_id, retry_count=self.retry_count
        )

    def retry(self, payload: api_pb2.FunctionInput) -> None:
        self.retry_count += 1
        self.done = False
        self.payload = payload


class Call:
    """One function call: a single input, or all those of a map, and what came back."""

    def __init__(
        self,
        function_id: str,
        invocation: "api_pb2.FunctionCallInvocationType.ValueType" = (
            api_pb2.FUNCTION_CALL_INVOCATION_TYPE_SYNC
        ),
    ) -> None:
        self.call_id = new_id("fc")
        self.function_id = function_id
        self.invocation = invocation
        self.inputs: dict[str, Input] = {}
        self.outputs: list[api_pb2.FunctionGetOutputsItem] = []
        self.data_in: list[api_pb2.DataChunk] = []
        self.data_out: list[api_pb2.DataChunk] = []
        self.changed = asyncio.Condition()
        self.closed = self.cancelled = False

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    @property
    def unfinished(self) -> int:
        return sum(not entry.done for entry in self.inputs.values())

    async def publish(
        self,
        entry: Input,
        result: api_pb2.GenericResult,
        *,
        data_format: "api_pb2.DataFormat.ValueType" = api_pb2.DATA_FORMAT_UNSPECIFIED,
        task_id: str = "",
        started_at: float = 0.0,
    ) -> None:
        entry.done = True
        self.outputs.append(
            api_pb2.FunctionGetOutputsItem(
                result=result,
                idx=entry.idx,
                input_id=entry.input_id,
                data_format=data_format,
                task_id=task_id,
                input_started_at=started_at,
                output_created_at=time.time(),
                retry_count=entry.retry_count,
            )
        )
        self.closed = True
        await self.notify()
