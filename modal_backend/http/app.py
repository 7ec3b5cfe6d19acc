"""The HTTP API: an OpenAI-compatible ASGI app over the one service.

| route | credential | |
|---|---|---|
| POST /v1/embeddings | key | OpenAI's, with our extensions (`openai_schema`) |
| GET /v1/models, /v1/models/{id} | key | the model, with its identity |
| GET /ready | key | 200 when vectors are served; 503 with the reason when not |
| GET /metrics | key | Prometheus |
| GET /openapi.json | key | this API, as an OpenAPI document |
| GET /health | none | 200 while the process runs |

Polling any of them keeps a scale-to-zero container up, and paid.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Final

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope

from kalm_integrations.codec import MEDIA_TYPE, packed_parts
from kalm_integrations.errors import (
    KalmError,
    NotFoundError,
    ServiceUnavailableError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.protocol import (
    ECHO_HEADER,
    IDENTITY_HEADER,
    REQUEST_ID_HEADER,
    WARNING_HEADER,
    EmbedRequest,
)
from modal_backend.admission import RETRY_AFTER
from modal_backend.http.headers import JSON, prefers_packed, quoted, timeout
from modal_backend.http.metrics import CONTENT_TYPE, Metrics
from modal_backend.http.middleware import BearerKeys, HttpGuard
from modal_backend.http.openapi import document
from modal_backend.http.responses import (
    error_response,
    no_such_route,
    nobody_listens,
    read_body,
    response,
    unless_disconnected,
)
from modal_backend.http.schema import EmbeddingsBody, render
from modal_backend.service import EmbeddingService

log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 16 * 2**20
# What is larger is parsed on a thread, or written in parts: the event loop must not stand still.
_PARSED_BYTES: Final = 65_536
_RETRY_HEADERS: Final = ("Retry-After", "Retry-After-Ms")
_EXPOSED_HEADERS: Final = (
    *(REQUEST_ID_HEADER, ECHO_HEADER, IDENTITY_HEADER, WARNING_HEADER),
    *_RETRY_HEADERS,
)
"""Headers of answers that a page in a browser may read, beside the ordinary ones."""
_WRITTEN_BYTES: Final = 2**20
_WRITTEN_NUMBERS: Final = 65_536
_LOG_EVERY: Final = 10.0
"""Seconds between two lines of the log about failures of one kind: an engine that dies, or too much
to do, fails hundreds of requests in one go. /metrics counts them all."""


def create_app(
    service: EmbeddingService,
    *,
    keys: BearerKeys,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_inside: int | None = None,
    phases: Mapping[str, float] | None = None,
    cors_origins: Sequence[str] = (),
    stopping: Callable[[], bool] = lambda: False,
) -> ASGIApp:
    """The ASGI app.

    Args:
        service: What answers.
        keys: Who may enter.
        max_body_bytes: Larger bodies are refused with 413, without being read whole.
        max_inside: Most requests at a time; more are refused with 503. None is no limit.
        phases: Seconds that each phase of the start took, for /metrics.
        cors_origins: Origins whose pages may call from a browser; "*" is every origin.
        stopping: Whether the server is shutting down and takes no new work.
    """
    door = _Door(service, max_body_bytes, phases or {})

    def identity() -> str | None:
        return None if service.failure else _fingerprint(service.identity)

    app = _App(
        routes=[
            Route("/v1/embeddings", door.embeddings, methods=["POST"]),
            Route("/v1/models", door.models),
            Route("/v1/models/{name:path}", door.model),
            Route("/ready", door.ready),
            Route("/metrics", door.metrics_page),
            Route("/openapi.json", door.openapi),
            Route("/health", door.health),
        ],
        exception_handlers={
            KalmError: door.failed,
            HTTPException: no_such_route,
            ClientDisconnect: nobody_listens,
        },
    )
    app.router.redirect_slashes = False
    guard = HttpGuard(
        app,
        keys=keys,
        identity=identity,
        warnings=lambda: service.warnings,
        metrics=door.metrics,
        refuse_early=door.refuse_early,
        max_inside=max_inside,
        stopping=stopping,
    )
    if not cors_origins:
        return guard
    # Around the guard: a browser sends no key with its preflight request, and shows a page no
    # answer without these headers, not even a 401.
    return CORSMiddleware(
        guard,
        allow_origins=cors_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=_EXPOSED_HEADERS,
    )


@lru_cache(maxsize=4)  # it takes longer to compute than to refuse a request
def _fingerprint(identity: SpaceIdentity) -> str:
    return identity.fingerprint


class _App(Starlette):
    """An app without `ServerErrorMiddleware`, which would answer what `HttpGuard` answers."""

    def build_middleware_stack(self) -> ASGIApp:
        return ExceptionMiddleware(self.router, handlers=self.exception_handlers)


class _Door:
    """The routes' handlers."""

    def __init__(
        self, service: EmbeddingService, max_body_bytes: int, phases: Mapping[str, float]
    ) -> None:
        self._service = service
        self._phases = phases
        self._max_body_bytes = max_body_bytes
        self._parsing = asyncio.Lock()
        """Of two large bodies at a time, the second one waits: while one is parsed, everything
        else in the process runs with interruptions."""
        self._logged: dict[str, tuple[float, int]] = {}
        """When a failure was logged last, and how many have not been since, by code."""
        self.metrics = Metrics()
        admission = service.admission
        for role in admission.in_progress:
            count = partial(admission.in_progress.__getitem__, role)
            self.metrics.in_progress.labels(role).set_function(count)
            self.metrics.wait.labels(role).set_function(partial(admission.wait, role))
        self.metrics.speed.set_function(lambda: admission.speed.tokens_per_second or 0.0)

    async def embeddings(self, request: Request) -> Response:
        start = time.perf_counter()
        packed = prefers_packed(request.headers)
        wait = timeout(request.headers)
        body = await read_body(request, self._max_body_bytes)
        if len(body) <= _PARSED_BYTES:
            asked, encoding = self._parse(body, packed, wait)
        else:
            async with self._parsing:
                asked, encoding = await asyncio.to_thread(self._parse, body, packed, wait)
        texts, role = len(asked.texts), asked.role
        work = self._service.embed(asked)
        del asked, body  # texts that the service has cut need not stay in memory
        try:
            answer = await unless_disconnected(request, work)
        except asyncio.CancelledError:  # by the server that shuts down
            raise ServiceUnavailableError("the service is stopping.", RETRY_AFTER) from None

        self.metrics.texts.labels(role).inc(texts)
        self.metrics.tokens.labels(role).inc(answer.usage.tokens)
        self.metrics.seconds.labels(role).observe(time.perf_counter() - start)
        whole = request.scope["http_version"] == "1.0"  # which has no parts
        if packed:
            whole = whole or answer.vectors.nbytes <= _WRITTEN_BYTES
            return response(packed_parts(answer), MEDIA_TYPE, short=whole)
        whole = whole or answer.vectors.size <= _WRITTEN_NUMBERS
        return response(render(answer, encoding), JSON, short=whole)

    def _parse(self, body: bytearray, packed: bool, wait: float | None) -> tuple[EmbedRequest, str]:
        """The request that a body is, and the encoding of a JSON answer."""
        fields = EmbeddingsBody.parse(body)
        self._check_model(fields.model)
        asked = fields.request(self._service.query_template, packed=packed, timeout=wait)
        return asked, fields.encoding_format or "float"

    async def refuse_early(
        self, scope: Scope, headers: Headers, receive: Receive
    ) -> tuple[KalmError | None, Receive]:
        """See `HttpGuard`. At several times the capacity most requests are refused: they must not
        take the time of those that are served."""
        if not self._service.admission.refusing or scope["path"] != "/v1/embeddings":
            return None, receive
        first = await receive()
        body = first.get("body", b"")
        if len(body) <= _PARSED_BYTES and not first.get("more_body") and scope["method"] == "POST":
            try:
                fields = EmbeddingsBody.parse(body)
                self._check_model(fields.model)
                template, wait = self._service.query_template, timeout(headers)
                self._service.check_admission(fields.request(template, packed=True, timeout=wait))
            except ServiceUnavailableError as error:
                self._log(scope["state"]["request_id"], error)
                return error, receive
            except KalmError:
                pass  # the handler finds out what is wrong
        messages = iter((first,))

        async def replay() -> Message:
            for message in messages:
                return message
            return await receive()

        return None, replay

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if not name:
            raise HTTPException(404)
        self._check_model(name)
        return JSONResponse(self._description())

    async def ready(self, _: Request) -> Response:
        if self._service.failure is not None:
            raise copy(self._service.failure)
        return JSONResponse({"status": "ready"})

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def metrics_page(self, _: Request) -> Response:
        for phase, seconds in self._phases.items():
            self.metrics.phases.labels(phase).set(seconds)
        self.metrics.warn(warning.code for warning in self._service.warnings)
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(document())

    async def failed(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, KalmError)
        request.state.end = error.code
        if error.status >= 500:
            self._log(request.state.request_id, error)
        return error_response(error)

    def _log(self, request_id: str, error: KalmError) -> None:
        now = time.monotonic()
        last, silent = self._logged.get(error.code, (-math.inf, 0))
        if now - last < _LOG_EVERY:
            self._logged[error.code] = (last, silent + 1)
            return
        self._logged[error.code] = (now, 0)
        more = f" ({silent:,} more like it since the last of these lines)" if silent else ""
        log.warning("request %s: %s%s", request_id, error.message, more)

    def _check_model(self, name: str | None) -> None:
        served = self._service.identity.model
        if name is not None and name != served:
            raise NotFoundError(f"model {quoted(name)} is not served here; {served!r} is.")

    def _description(self) -> dict[str, object]:
        service = self._service
        return {
            "id": service.identity.model,
            "object": "model",
            "created": 0,
            "owned_by": "kalm-integrations",
            "identity": service.identity.to_dict(),
            "fingerprint": service.identity.fingerprint,
            "dimensions": list(service.dimensions),
            "max_tokens": service.max_tokens,
            "warnings": [asdict(warning) for warning in service.warnings],
        }
