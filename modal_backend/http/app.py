"""The HTTP API: an OpenAI-compatible ASGI app for the service.

| route | credential | |
|---|---|---|
| POST /v1/embeddings | key | OpenAI's, with our extensions (`schema`) |
| GET /v1/models, /v1/models/{id} | key | the model, with its identity |
| GET /ready | key | 200 if vectors are served, else 503 with the reason |
| GET /metrics | key | Prometheus |
| GET /openapi.json | key | this API, as an OpenAPI document |
| GET /health | none | 200 while the process runs |

Polling any of them keeps a scale-to-zero container running, and billed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from copy import copy
from typing import Final, TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from kalm_integrations import tracing
from kalm_integrations.codec import MEDIA_TYPE, packed_parts
from kalm_integrations.errors import KalmError, NotFoundError
from kalm_integrations.protocol import (
    ECHO_HEADER,
    IDENTITY_HEADER,
    REQUEST_ID_HEADER,
    WARNING_HEADER,
    EmbedRequest,
)
from modal_backend.http import json_body
from modal_backend.http.auth import BearerKeys
from modal_backend.http.metrics import CONTENT_TYPE, Metrics
from modal_backend.http.middleware import RequestMiddleware
from modal_backend.http.openapi import document
from modal_backend.http.responses import (
    ErrorResponse,
    Model,
    Models,
    Status,
    embeddings_json,
    response_of,
)
from modal_backend.http.schema import JSON, EmbeddingsBody, prefers_packed, timeout_of
from modal_backend.service import EmbeddingService

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_BODY_BYTES: Final = 16 * 2**20
_EXPOSED_HEADERS: Final = (
    REQUEST_ID_HEADER, ECHO_HEADER, IDENTITY_HEADER, WARNING_HEADER, "Retry-After",
    "Retry-After-Ms",
)  # fmt: skip
"""Response headers that a page in a browser may read, in addition to the standard ones."""
_LOOP_BYTES: Final = 65_536
"""Longer bodies are parsed in a thread, so that the event loop does not stall."""
_WHOLE_BYTES: Final = 2**20
_WHOLE_NUMBERS: Final = 65_536
"""Larger responses are written in parts, for the same reason."""
_LOG_SECONDS: Final = 10.0
"""Time between two log lines about errors of one code. An engine that dies, or an overload, fails
hundreds of requests at once; /metrics counts all of them."""


def create_app(
    service: EmbeddingService,
    *,
    keys: BearerKeys,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_concurrency: int | None = None,
    phases: Mapping[str, float] | None = None,
    cors_origins: Sequence[str] = (),
    stopping: Callable[[], bool] = lambda: False,
) -> ASGIApp:
    """The ASGI app.

    Args:
        service: Answers the requests.
        keys: The valid keys.
        max_body_bytes: Larger bodies are refused with 413, and not read to their end.
        max_concurrency: Most requests at a time; more are refused with 503. None for no limit.
        phases: Seconds of each phase of the start, for /metrics.
        cors_origins: Origins whose pages may call from a browser; "*" is every origin.
        stopping: Whether the server is shutting down and accepts no new requests.
    """
    handlers = _Handlers(service, max_body_bytes, phases or {})
    app: ASGIApp = RequestMiddleware(
        _Routes(
            routes=[
                Route("/v1/embeddings", handlers.embeddings, methods=["POST"]),
                Route("/v1/models", handlers.models),
                Route("/v1/models/{name:path}", handlers.model),
                Route("/ready", handlers.ready),
                Route("/metrics", handlers.metrics_page),
                Route("/openapi.json", handlers.openapi),
                Route("/health", handlers.health),
            ],
            exception_handlers={
                KalmError: handlers.failed,
                HTTPException: _no_such_route,
                ClientDisconnect: _disconnected,
            },
        ),
        service,
        keys=keys,
        metrics=handlers.metrics,
        max_concurrency=max_concurrency,
        stopping=stopping,
    )
    if not cors_origins:
        return app
    # Outermost: a browser sends no key with its preflight request, and hides every response
    # without these headers from the page, 401 included.
    return CORSMiddleware(
        app,
        allow_origins=cors_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=_EXPOSED_HEADERS,
    )


class _Routes(Starlette):
    """Starlette without `ServerErrorMiddleware`, whose work `RequestMiddleware` does, and without
    redirects: behind a proxy that speaks TLS, some clients would follow them in clear text."""

    def build_middleware_stack(self) -> ASGIApp:
        self.router.redirect_slashes = False
        return ExceptionMiddleware(self.router, handlers=self.exception_handlers)


class _Handlers:
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
        self.metrics = Metrics(service, phases)

    async def embeddings(self, request: Request) -> Response:
        with tracing.server_span(request.headers):
            return await self._embeddings(request)

    async def _embeddings(self, request: Request) -> Response:
        received = time.monotonic()  # the header, before the body
        packed = prefers_packed(request.headers)
        timeout = timeout_of(request.headers)
        body = await json_body.read(request, self._max_body_bytes)
        if len(body) <= _LOOP_BYTES:
            parsed, encoding = self._parse(body, packed, timeout)
        else:
            async with self._parsing:
                parsed, encoding = await asyncio.to_thread(self._parse, body, packed, timeout)
        self._service.check_admission(parsed, received)
        count, role = len(parsed.texts), parsed.role
        work = self._service.embed(parsed, received)
        del parsed, body  # texts that the service truncates need not stay in memory
        result = await _unless_disconnected(request, work)

        self.metrics.texts.labels(role).inc(count)
        self.metrics.tokens.labels(role).inc(result.usage.tokens or 0)
        self.metrics.seconds.labels(role).observe(time.monotonic() - received)
        whole = request.scope["http_version"] == "1.0"  # which has no chunked responses
        if packed:
            whole = whole or result.vectors.nbytes <= _WHOLE_BYTES
            return response_of(packed_parts(result), MEDIA_TYPE, whole=whole)
        whole = whole or result.vectors.size <= _WHOLE_NUMBERS
        return response_of(embeddings_json(result, encoding), JSON, whole=whole)

    def _parse(
        self, body: bytearray, packed: bool, timeout: float | None
    ) -> tuple[EmbedRequest, str]:
        """The request in a body, and the encoding of a JSON response."""
        fields = EmbeddingsBody.parse(body)
        self._check_model(fields.model)
        request = fields.request(self._service.query_template, packed=packed, timeout=timeout)
        return request, fields.encoding_format or "float"

    async def models(self, _: Request) -> Response:
        return _json(Models(data=(Model.of(self._service),)))

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if not name:
            raise HTTPException(404)
        self._check_model(name)
        return _json(Model.of(self._service))

    async def ready(self, _: Request) -> Response:
        if self._service.failure is not None:
            raise copy(self._service.failure)
        return _json(Status(status="ready"))

    async def health(self, _: Request) -> Response:
        return _json(Status(status="alive"))

    async def metrics_page(self, _: Request) -> Response:
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

    def _check_model(self, name: str | None) -> None:
        served = self._service.identity.model
        if name is not None and name != served:
            raise NotFoundError(f"model {name!r} is not served here; {served!r} is.")


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


async def _no_such_route(request: Request, error: Exception) -> Response:
    """The response for an unknown path or method. It names the path that was probably meant."""
    assert isinstance(error, HTTPException)
    path, headers = request.url.path, dict(error.headers or {})
    if allowed := headers.get("Allow"):
        message = f"{request.method} is not allowed at {path!r}; use {allowed}."
    else:
        paths = {route.path.rpartition("/")[2]: route.path for route in request.app.routes}
        matches = [paths[name] for name in path.lower().split("/") if name in paths]
        hint = f"; the path is {matches[-1]}" if matches else ""
        message = f"there is no route {path!r}{hint}."
    return ErrorResponse(NotFoundError(message), error.status_code, headers)


async def _disconnected(request: Request, _: Exception) -> Response:
    """The response to a caller who has disconnected. Only logs and metrics see it."""
    request.state.code = "caller_left"
    return Response(status_code=499)  # nginx's status for it
