"""The handlers of the routes."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Mapping
from copy import copy
from functools import partial
from typing import Final, TypeVar

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kalm_integrations import tracing
from kalm_integrations.batching import estimate_tokens
from kalm_integrations.codec import MEDIA_TYPE, packed_parts
from kalm_integrations.errors import KalmError, NotFoundError, PermissionDeniedError
from kalm_integrations.prompts import AS_IS, Role
from kalm_integrations.protocol import EmbedRequest
from modal_backend.http import json_body
from modal_backend.http.auth import Caller
from modal_backend.http.metrics import CONTENT_TYPE, Metrics
from modal_backend.http.openapi import document
from modal_backend.http.responses import (
    ErrorResponse,
    Model,
    Models,
    Status,
    TokenCounts,
    embeddings_json,
    response_of,
)
from modal_backend.http.roles import RoleCheck, set_role, split_model
from modal_backend.http.schema import JSON, EmbeddingsBody, prefers_packed, timeout_of
from modal_backend.service import EmbeddingService

log = logging.getLogger(__name__)
T = TypeVar("T")

_LOOP_BYTES: Final = 65_536
"""Longer bodies are parsed in a thread, so that the event loop does not stall."""
_WHOLE_BYTES: Final = 2**20
_WHOLE_NUMBERS: Final = 65_536
"""Larger responses are written in parts, for the same reason."""
_LOG_SECONDS: Final = 10.0
"""Time between two log lines about errors of one code. An engine that dies, or an overload, fails
hundreds of requests at once; /metrics counts all of them."""


class Handlers:
    """The handlers of the routes."""

    def __init__(
        self, service: EmbeddingService, max_body_bytes: int, phases: Mapping[str, float]
    ) -> None:
        self._service = service
        self._max_body_bytes = max_body_bytes
        self._parsing = asyncio.Lock()
        """One large body at a time: parsing one slows down everything else in the process."""
        self._logged: dict[str, tuple[float, int]] = {}
        """Per error code: when it was last logged, and how many errors were not logged since."""
        self._role_check = RoleCheck()
        self.metrics = Metrics(service, phases)

    def routes(self, root: str, role: Role | None) -> list[Route]:
        """The routes under a base URL of OpenAI's API, for texts of `role`."""
        embeddings = partial(self.embeddings, role=role)
        count_tokens = partial(self.count_tokens, role=role)
        return [
            Route(f"{root}/embeddings", embeddings, methods=["POST"]),
            Route(f"{root}/count_tokens", count_tokens, methods=["POST"]),
            Route(f"{root}/models", self.models),
            Route(f"{root}/models/{{name:path}}", self.model),
        ]

    async def count_tokens(self, request: Request, role: Role | None) -> Response:
        received = time.monotonic()
        parsed, _ = await self._read(request, role, packed=True)
        work = self._service.count_tokens(parsed, received)
        return _json(
            TokenCounts(
                model=self._service.identity.model,
                counts=tuple(await _unless_disconnected(request, work)),
                max_tokens=self._service.max_tokens,
            )
        )

    async def embeddings(self, request: Request, role: Role | None) -> Response:
        with tracing.server_span(request.headers):
            return await self._embeddings(request, role)

    async def _embeddings(self, request: Request, role: Role | None) -> Response:
        received = time.monotonic()  # the header, before the body
        packed = prefers_packed(request.headers)
        parsed, encoding = await self._read(request, role, packed=packed)
        self._service.check_admission(parsed, received)
        count, role = len(parsed.texts), parsed.role
        work = self._service.embed(parsed, received)
        del parsed  # texts that the service truncates need not stay in memory
        try:
            result = await _unless_disconnected(request, work)
        except ClientDisconnect:  # else a key could use the engine beyond its limit
            most = count * self._service.max_tokens
            request.state.caller.tokens.use(min(estimate_tokens(request.state.size), most))
            raise

        request.state.tokens = tokens = result.usage.tokens or 0
        request.state.caller.tokens.use(tokens)
        self.metrics.texts.labels(role).inc(count)
        self.metrics.tokens.labels(role).inc(tokens)
        self.metrics.seconds.labels(role).observe(time.monotonic() - received)
        whole = request.scope["http_version"] == "1.0"  # which has no chunked responses
        if packed:
            whole = whole or result.vectors.nbytes <= _WHOLE_BYTES
            return response_of(packed_parts(result), MEDIA_TYPE, whole=whole)
        whole = whole or result.vectors.size <= _WHOLE_NUMBERS
        return response_of(embeddings_json(result, encoding), JSON, whole=whole)

    async def _read(
        self, request: Request, role: Role | None, *, packed: bool
    ) -> tuple[EmbedRequest, str]:
        """Read the body of a request, and parse it in a thread if that takes long."""
        timeout = timeout_of(request.headers)
        body = await json_body.read(request, self._max_body_bytes)
        request.state.size = len(body)
        parse = partial(self._parse, body, role, request.state.caller, packed, timeout)
        if len(body) <= _LOOP_BYTES:
            return parse()
        async with self._parsing:
            return await asyncio.to_thread(parse)

    def _parse(
        self,
        body: bytearray,
        path_role: Role | None,
        caller: Caller,
        packed: bool,
        timeout: float | None,
    ) -> tuple[EmbedRequest, str]:
        """The request in a body, and the encoding of a JSON response."""
        fields = EmbeddingsBody.parse(body)
        set_role(fields, path_role, self._check_model(fields.model))
        if self._service.query_template != AS_IS:
            self._role_check.warn(fields, caller.name)
        if caller.queries_only and (fields.input_type or fields.priority) != "query":
            raise _queries_only(caller)
        request = fields.request(self._service.query_template, packed=packed, timeout=timeout)
        return request, fields.encoding_format or "float"

    async def models(self, _: Request) -> Response:
        return _json(Models(data=(Model.of(self._service),)))

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if not name:
            raise HTTPException(404)
        self._check_model(name)
        return _json(Model.of(self._service).model_copy(update={"id": name}))

    async def ready(self, _: Request) -> Response:
        if self._service.failure is not None:
            raise copy(self._service.failure)
        return _json(Status(status="ready"))

    async def health(self, _: Request) -> Response:
        return _json(Status(status="alive"))

    async def metrics_page(self, request: Request) -> Response:
        if request.state.caller.queries_only:
            raise _queries_only(request.state.caller)
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(document())

    async def failed(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, KalmError)
        if error.status >= 500:
            self._log(request.state.request_id, error)
        return ErrorResponse(error)

    def _log(self, request_id: str, error: KalmError) -> None:
        now = time.monotonic()
        last, omitted = self._logged.get(error.code, (-math.inf, 0))
        if now - last < _LOG_SECONDS:
            self._logged[error.code] = (last, omitted + 1)
            return
        self._logged[error.code] = (now, 0)
        more = f" ({omitted:,} similar errors since the last such line)" if omitted else ""
        log.warning("request %s: %s%s", request_id, error.message, more)

    def _check_model(self, name: str | None) -> Role | None:
        """The role in a model's name, which has to be that of the served model."""
        served = self._service.identity.model
        base, role = split_model(name or served, served)
        if base != served:
            raise NotFoundError(f"model {name!r} is not served here; {served!r} is.")
        return role


def _queries_only(caller: Caller) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"key {caller.name!r} may only embed queries: use the base URL /query/v1, the model's name "
        'with ":query", or input_type="query".'
    )


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type=JSON)


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the caller disconnects first.

    Raises:
        ClientDisconnect: The caller disconnected.
    """

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        working.cancel()
        leaving.cancel()
