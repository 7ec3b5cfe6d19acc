"""The HTTP API: an OpenAI-compatible ASGI app for the service.

| route | credential | |
|---|---|---|
| POST /v1/embeddings | key | OpenAI's, with our extensions (`schema`) |
| GET /v1/models, /v1/models/{id} | key | the model, with its identity |
| POST /v1/count_tokens | key | the tokens of each text of the same body |
| the same under /query and /document | key | for texts of that role (`roles`) |
| GET /ready | key | 200 if vectors are served, else 503 with the reason |
| GET /metrics | key | Prometheus |
| GET /openapi.json | key | this API, as an OpenAPI document |
| GET /health | none | 200 while the process runs |

Polling any of them keeps a scale-to-zero container running, and billed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from kalm_integrations.errors import KalmError, NotFoundError
from kalm_integrations.protocol import (
    ECHO_HEADER,
    IDENTITY_HEADER,
    REQUEST_ID_HEADER,
    WARNING_HEADER,
)
from modal_backend.http.auth import BearerKeys
from modal_backend.http.handlers import Handlers
from modal_backend.http.middleware import RequestMiddleware
from modal_backend.http.responses import ErrorResponse
from modal_backend.service import EmbeddingService

MAX_BODY_BYTES: Final = 16 * 2**20
_EXPOSED_HEADERS: Final = (
    REQUEST_ID_HEADER, ECHO_HEADER, IDENTITY_HEADER, WARNING_HEADER, "Retry-After",
    "Retry-After-Ms",
)  # fmt: skip
"""Response headers that a page in a browser may read, in addition to the standard ones."""


def create_app(
    service: EmbeddingService,
    *,
    keys: BearerKeys,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_concurrency: int | None = None,
    phases: Mapping[str, float] | None = None,
    cors_origins: Sequence[str] = (),
    stopping: Callable[[], bool] = lambda: False,
    behind: Callable[[], bool] = lambda: False,
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
        behind: Whether requests wait before the server reads them. During an overload, requests
            are then refused before they are parsed, which takes half the time.
    """
    handlers = Handlers(service, max_body_bytes, phases or {})
    app: ASGIApp = RequestMiddleware(
        _Routes(
            routes=[
                *handlers.routes("/query/v1", "query"),
                *handlers.routes("/document/v1", "document"),
                *handlers.routes("/v1", None),
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
        behind=behind,
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


async def _no_such_route(request: Request, error: Exception) -> Response:
    """The response for an unknown path or method. It names the path that was probably meant."""
    assert isinstance(error, HTTPException)
    path, headers = request.url.path, dict(error.headers or {})
    if allowed := headers.get("Allow"):
        message = f"{request.method} is not allowed at {path!r}; use {allowed}."
    else:
        root = f"/{path.split('/')[1].lower()}/"
        routes = sorted(request.app.routes, key=lambda route: route.path.startswith(root))
        paths = {route.path.rpartition("/")[2]: route.path for route in routes}  # the last counts
        matches = [paths[name] for name in path.lower().split("/") if name in paths]
        hint = f"; the path is {matches[-1]}" if matches else ""
        message = f"there is no route {path!r}{hint}."
    return ErrorResponse(NotFoundError(message), error.status_code, headers)


async def _disconnected(request: Request, _: Exception) -> Response:
    """The response to a caller who has disconnected. Only logs and metrics see it."""
    request.state.code = "caller_left"
    return Response(status_code=499)  # nginx's status for it
