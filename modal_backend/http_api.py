"""The HTTP door: an OpenAI-compatible ASGI app over the one service.

| route | credential | |
|---|---|---|
| POST /v1/embeddings | key | OpenAI's, with our extensions (`openai_schema`) |
| GET /v1/models, /v1/models/{id} | key | the model, with its identity |
| GET /ready | key | 200 when vectors are served; 503 with the reason when not |
| GET /metrics | key | Prometheus |
| GET /health | none | 200 while the process runs |

Polling any of them keeps a scale-to-zero container up, and paid.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from copy import copy
from functools import lru_cache, partial
from typing import Final, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope

from kalm_integrations.errors import (
    ConfigurationError,
    KalmError,
    NotFoundError,
    RequestTooLargeError,
    ServiceUnavailableError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.wire import MEDIA_TYPE, TIMEOUT_HEADER, packed_parts
from modal_backend.admission import RETRY_AFTER
from modal_backend.http_guard import BearerKeys, HttpGuard
from modal_backend.metrics import CONTENT_TYPE, Metrics
from modal_backend.openai_schema import EmbeddingsBody, error_headers, render, render_error
from modal_backend.service import EmbeddingService

log = logging.getLogger(__name__)
T = TypeVar("T")
Part = bytes | memoryview

MAX_BODY_BYTES: Final = 16 * 2**20
# What is larger is parsed on a thread, or written in parts: the event loop must not stand still.
_PARSED_BYTES: Final = 65_536
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
) -> Starlette:
    """The ASGI app.

    Args:
        service: What answers.
        keys: Who may enter.
        max_body_bytes: Larger bodies are refused with 413, without being read whole.
        max_inside: Most requests at a time; more are refused with 503. None is no limit.
        phases: Seconds that each phase of the start took, for /metrics.
    """
    door = _Door(service, max_body_bytes, phases or {})

    def identity() -> str | None:
        return None if service.failure else _fingerprint(service.identity)

    return Starlette(
        routes=[
            Route("/v1/embeddings", door.embeddings, methods=["POST"]),
            Route("/v1/models", door.models),
            Route("/v1/models/{name:path}", door.model),
            Route("/ready", door.ready),
            Route("/metrics", door.metrics_page),
            Route("/health", door.health),
        ],
        middleware=[
            Middleware(
                HttpGuard,
                keys=keys,
                identity=identity,
                metrics=door.metrics,
                refuse_early=door.refuse_early,
                max_inside=max_inside,
            )
        ],
        exception_handlers={
            KalmError: door.failed,
            HTTPException: _no_such_route,
            ClientDisconnect: _nobody_listens,
        },
    )


@lru_cache(maxsize=4)  # it takes longer to compute than to refuse a request
def _fingerprint(identity: SpaceIdentity) -> str:
    return identity.fingerprint


class _Door:
    """The routes' handlers."""

    def __init__(
        self, service: EmbeddingService, max_body_bytes: int, phases: Mapping[str, float]
    ) -> None:
        self._service = service
        self._phases = phases
        self._max_body_bytes = max_body_bytes
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
        body = await self._read(request)
        packed = _accepts_packed(request.headers.get("accept", ""))
        if len(body) <= _PARSED_BYTES:
            fields = EmbeddingsBody.parse(body)
        else:
            fields = await asyncio.to_thread(EmbeddingsBody.parse, body)
        self._check_model(fields.model)
        asked = fields.request(
            self._service.query_template, packed=packed, timeout=_timeout(request.headers)
        )
        try:
            answer = await _unless_disconnected(request, self._service.embed(asked))
        except asyncio.CancelledError:  # by the server that shuts down
            raise ServiceUnavailableError("the service is stopping.", RETRY_AFTER) from None

        self.metrics.texts.labels(asked.role).inc(len(asked.texts))
        self.metrics.tokens.labels(asked.role).inc(answer.usage.tokens)
        self.metrics.seconds.labels(asked.role).observe(time.perf_counter() - start)
        if packed:
            return _response(
                packed_parts(answer), MEDIA_TYPE, answer.vectors.nbytes <= _WRITTEN_BYTES
            )
        parts = render(answer, fields.encoding_format)
        return _response(parts, "application/json", answer.vectors.size <= _WRITTEN_NUMBERS)

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
                template, wait = self._service.query_template, _timeout(headers)
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
        self._check_model(request.path_params["name"])
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
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)

    async def failed(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, KalmError)
        request.state.end = error.code
        if error.status >= 500:
            self._log(request.state.request_id, error)
        return _json_error(error, error_headers(error))

    def _log(self, request_id: str, error: KalmError) -> None:
        now = time.monotonic()
        last, silent = self._logged.get(error.code, (-math.inf, 0))
        if now - last < _LOG_EVERY:
            self._logged[error.code] = (last, silent + 1)
            return
        self._logged[error.code] = (now, 0)
        more = f" ({silent:,} more like it since the last of these lines)" if silent else ""
        log.warning("request %s: %s%s", request_id, error, more)

    def _check_model(self, name: str | None) -> None:
        served = self._service.identity.model
        if name not in (None, served):
            raise NotFoundError(f"model {name!r} is not served here; {served!r} is.")

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
        }

    async def _read(self, request: Request) -> bytes:
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ConfigurationError("a compressed body: send it as it is.")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise RequestTooLargeError(f"a body over {self._max_body_bytes:,} bytes.")
        return bytes(body)


def _response(parts: Iterable[Part], media_type: str, short: bool) -> Response:
    if short:
        return Response(b"".join(parts), media_type=media_type)
    return StreamingResponse(_in_turn(parts), media_type=media_type)


async def _in_turn(parts: Iterable[Part]) -> AsyncIterator[Part]:
    """`parts`, and between them whatever else the event loop has to do."""
    for part in parts:
        yield part
        await asyncio.sleep(0)


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the caller goes away first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _accepts_packed(accept: str) -> bool:
    for choice in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in choice.split(";"))
        if kind == MEDIA_TYPE:
            return not any(re.fullmatch(r"q=0(\.0*)?", parameter) for parameter in parameters)
    return False


def _timeout(headers: Headers) -> float | None:
    value = headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigurationError(f"{TIMEOUT_HEADER}: {value!r} is no number of seconds.")
    return seconds


def _json_error(error: KalmError, headers: dict[str, str] | None = None) -> Response:
    return Response(
        render_error(error), error.status, headers=headers, media_type="application/json"
    )


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    request.state.end = NotFoundError.code
    response = _json_error(NotFoundError(f"{error.detail}."), dict(error.headers or {}))
    response.status_code = error.status_code
    return response


async def _nobody_listens(request: Request, _: Exception) -> Response:
    request.state.end = "caller_left"
    return Response(status_code=499)  # nginx's; only the access log sees it
