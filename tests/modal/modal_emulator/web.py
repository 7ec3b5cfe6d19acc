"""The web door: what stands between an HTTP client and a function's ASGI app."""

import asyncio
import collections
import functools
import pickle
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from aiohttp import web
from modal_proto import api_pb2

from .model import Call, Function, Input
from .streams import follow
from .tokens import new_id

if TYPE_CHECKING:
    from .cloud import Cloud

INLINE_LIMIT = 2 * 1024 * 1024
RESULT_PARAMETER = "__modal_function_call_id"
_SECRET_HEADERS = {"modal-key", "modal-secret"}
_HOP_HEADERS = {"transfer-encoding", "connection"}


class WebDoor:
    """Every endpoint has an address of its own, on loopback, over plain HTTP.

    Each request is an input of the function: it queues, starts containers, is lost with them and
    run again, like any other call. `refusals` are answers given in place of the next ones.
    """

    def __init__(self, cloud: "Cloud") -> None:
        self.cloud = cloud
        self.refusals: collections.deque[web.Response] = collections.deque()

    async def open(self, function: Function) -> None:
        """Gives addresses to the web endpoints of a function; a redeployment keeps them."""
        definition = function.definition
        names = [n for n, m in definition.method_definitions.items() if m.webhook_config.type]
        if definition.webhook_config.type:
            names.append("")
        for name in names:
            if name not in function.web_urls:
                application = web.Application(client_max_size=1 << 32)
                handler = functools.partial(self._handle, function, name)
                application.router.add_route("*", "/{tail:.*}", handler)
                function.web_urls[name] = await self.cloud.listen(application)
            if name:
                definition.method_definitions[name].web_url = function.web_urls[name]
            else:
                definition.web_url = function.web_urls[name]

    # -- who may pass --------------------------------------------------------------------------
    async def _handle(
        self, function: Function, method: str, request: web.Request
    ) -> web.StreamResponse:
        protected = _config(function, method).requires_proxy_auth
        if (refusal := self._refuse(request, protected=protected)) is not None:
            return refusal
        if self.cloud.apps[function.app_id].state == api_pb2.APP_STATE_STOPPED:
            return web.Response(status=404, text="modal-http: the app is stopped")
        return await self._endpoint(function, method, request)

    def _refuse(self, request: web.Request, *, protected: bool) -> web.Response | None:
        given = (request.headers.get("Modal-Key"), request.headers.get("Modal-Secret"))
        if protected and given not in self.cloud.options.proxy_tokens:
            text = "modal-http: missing credentials for proxy authorization"
            return web.Response(status=401, text=text)
        return self.refusals.popleft() if self.refusals else None

    # -- a request as a function call ----------------------------------------------------------
    async def _endpoint(
        self, function: Function, method: str, request: web.Request
    ) -> web.StreamResponse:
        call = self.cloud.calls.get(request.query.get(RESULT_PARAMETER, ""))
        if call is None:
            call = self._start_call(function, method, request, await request.read())
        try:
            return await self._answer(function, method, request, call)
        except (asyncio.CancelledError, ConnectionResetError):
            # The client hung up; the app is told, as an ASGI server would.
            gone = api_pb2.Asgi(http_disconnect=api_pb2.Asgi.HttpDisconnect())
            call.data_in.append(_chunk(2, gone.SerializeToString()))
            await call.notify()
            raise

    def _start_call(
        self, function: Function, method: str, request: web.Request, body: bytes
    ) -> Call:
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": request.method,
            "scheme": "https",
            "path": request.path,
            "query_string": request.query_string.encode(),
            "headers": [
                (name.lower().encode(), value.encode()) for name, value in _passed_headers(request)
            ],
            "client": (request.remote, 0),
        }
        call = Call(function.function_id)
        self.cloud.calls[call.call_id] = call
        payload = api_pb2.FunctionInput(
            args=pickle.dumps(((scope,), {}), protocol=4),
            data_format=api_pb2.DATA_FORMAT_PICKLE,
            method_name=method,
        )
        entry = Input(new_id("in"), call, 0, payload)
        call.inputs[entry.input_id] = entry
        message = api_pb2.Asgi(
            http_request=api_pb2.Asgi.HttpRequest(body=body, more_body=False)
        ).SerializeToString()
        if len(message) > INLINE_LIMIT:
            blob_id = new_id("bl")
            self.cloud.blobs.put(blob_id, message)
            chunk = api_pb2.DataChunk(
                data_format=api_pb2.DATA_FORMAT_ASGI, index=1, data_blob_id=blob_id
            )
        else:
            chunk = _chunk(1, message)
        # In place before the input is: the app waits five seconds for its first message, no more.
        call.data_in.append(chunk)
        self.cloud.pool(function.function_id).enqueue(entry)
        return call

    async def _answer(
        self, function: Function, method: str, request: web.Request, call: Call
    ) -> web.StreamResponse:
        messages = self._messages(call)
        try:
            async with asyncio.timeout(self.cloud.options.web_redirect_after):
                first = await anext(messages, None)
        except TimeoutError:
            query = dict(request.query) | {RESULT_PARAMETER: call.call_id}
            url = request.rel_url.with_query(query)
            headers = {"Location": f"{function.web_urls[method]}{url}"}
            return web.Response(status=303, headers=headers)
        if first is None:
            reason = call.outputs[-1].result.exception
            return web.Response(status=500, text=f"modal-http: internal error: {reason}")
        start = first.http_response_start
        response = web.StreamResponse(status=start.status)
        for name, value in zip(start.headers[::2], start.headers[1::2], strict=True):
            if name.decode().lower() not in _HOP_HEADERS:
                response.headers.add(name.decode(), value.decode())
        await response.prepare(request)
        complete = False
        async for message in messages:
            if message.WhichOneof("type") == "http_response_body":
                await response.write(message.http_response_body.body)
                if complete := not message.http_response_body.more_body:
                    break
        if not complete and request.transport is not None:
            # The app failed in mid-answer: the client must not take the rest for the whole.
            request.transport.close()
        await response.write_eof()
        return response

    async def _messages(self, call: Call) -> AsyncIterator[api_pb2.Asgi]:
        async for chunk in follow(call, call.data_out, 0):
            if chunk.data_format != api_pb2.DATA_FORMAT_ASGI:
                continue
            inline = chunk.WhichOneof("data_oneof") == "data"
            data = chunk.data if inline else self.cloud.blobs.get(chunk.data_blob_id)
            yield api_pb2.Asgi.FromString(data)


def _config(function: Function, method: str) -> api_pb2.WebhookConfig:
    definition = function.definition
    owner = definition.method_definitions[method] if method else definition
    return owner.webhook_config


def _passed_headers(request: web.Request) -> list[tuple[str, str]]:
    return [(n, v) for n, v in request.headers.items() if n.lower() not in _SECRET_HEADERS]


def _chunk(index: int, data: bytes) -> api_pb2.DataChunk:
    return api_pb2.DataChunk(data_format=api_pb2.DATA_FORMAT_ASGI, index=index, data=data)
