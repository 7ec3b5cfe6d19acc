"""The layer around all routes: credentials, request ids, response headers, unexpected errors."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kalm_integrations.errors import (
    AuthenticationError,
    KalmError,
    ServiceUnavailableError,
    TransportError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.protocol import (
    ECHO_HEADER,
    IDENTITY_HEADER,
    REQUEST_ID_HEADER,
    WARNING_HEADER,
)
from modal_backend.admission import RETRY_AFTER
from modal_backend.engines.base import stopping_error
from modal_backend.http.auth import BearerKeys, Caller
from modal_backend.http.metrics import Metrics
from modal_backend.http.responses import ErrorResponse
from modal_backend.http.shedding import Shedding
from modal_backend.service import EmbeddingService

log = logging.getLogger(__name__)
access = logging.getLogger("uvicorn.error")  # which the server shows

PUBLIC_ROUTES: Final = frozenset({"/health"})
UNCOUNTED_ROUTES: Final = frozenset({"/health", "/ready", "/metrics"})
"""Monitoring is not counted as use of the service; its refusals are."""

_SAFE_ID: Final = re.compile(r"[\w.-]{1,64}")


class RequestMiddleware:
    """Checks the bearer key before the body is read, and adds the headers of every response.

    Args:
        app: The ASGI app with the routes.
        service: Its identity and warnings are sent as headers.
        keys: The valid keys.
        metrics: Counts the requests.
        max_concurrency: Most requests at a time, so that RPC calls to the same container keep their
            share; None for no limit.
        stopping: Whether the server is shutting down and accepts no new requests.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: EmbeddingService,
        *,
        keys: BearerKeys,
        metrics: Metrics,
        max_concurrency: int | None,
        stopping: Callable[[], bool],
        behind: Callable[[], bool],
    ) -> None:
        self._app = app
        self._service = service
        self._keys = keys
        self._metrics = metrics
        self._max_concurrency = max_concurrency
        self._requests = 0  # in progress
        self._stopping = stopping
        self._shedding = Shedding(service.admission, behind)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _safe_id(headers, REQUEST_ID_HEADER) or uuid.uuid4().hex
        echo = _safe_id(headers, ECHO_HEADER)
        state = scope.setdefault("state", {})
        state |= {"request_id": request_id, "received": time.monotonic()}
        caller = state["caller"] = self._keys.identify(headers.get("authorization", ""))
        # The server reads it: when it is full, it closes connections without a valid key first.
        state["authorized"] = caller is not None
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._count(scope, message["status"])
                fields = {REQUEST_ID_HEADER: request_id}
                if self._service.failure is None:
                    fields[IDENTITY_HEADER] = _fingerprint(self._service.identity)
                if warnings := self._service.warnings:
                    fields[WARNING_HEADER] = ",".join(warning.code for warning in warnings)
                if echo:
                    fields[ECHO_HEADER] = echo
                added = [
                    (name.lower().encode(), value.encode("latin-1"))
                    for name, value in fields.items()
                ]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        async def refuse(error: KalmError) -> None:
            await ErrorResponse(error)(scope, receive, send_with_headers)

        if refusal := self._refusal(scope):
            await refuse(refusal)
            return
        if scope["method"] == "POST" and (response := self._shedding.response()):
            await response(scope, receive, send_with_headers)
            return
        self._requests += 1
        try:
            await self._app(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            if not self._stopping():
                raise
            # The server cancelled it at the end of the grace period. The task ends normally, so
            # that the response is sent; one that has begun cannot be replaced by an error.
            if not started:
                await refuse(stopping_error())
        except Exception as error:
            # The log gets the traceback, the caller only the id under which it is logged.
            log.exception("request %s failed unexpectedly", request_id)
            if started:
                raise
            failure = TransportError(f"the service failed; see its log for request {request_id}.")
            failure.__cause__ = error
            await refuse(failure)
        finally:
            self._requests -= 1

    def _refusal(self, scope: Scope) -> KalmError | None:
        """Why a request does not reach the routes; None if it does."""
        if scope["path"] in PUBLIC_ROUTES:
            return None
        if not scope["state"]["authorized"]:
            return AuthenticationError("the bearer key is missing or wrong.")
        if self._stopping():
            return stopping_error()
        caller: Caller = scope["state"]["caller"]
        if scope["method"] == "POST" and (error := caller.over_limit()):
            return error
        if self._max_concurrency is not None and self._requests >= self._max_concurrency:
            return ServiceUnavailableError(
                f"this container has {self._requests} HTTP requests in progress, its limit; "
                "--concurrency and --max-containers of `kalm deploy` raise it.",
                RETRY_AFTER,
            )
        return None

    def _count(self, scope: Scope, status: int) -> None:
        """Count the request by an error's code, "ok" or the status; log that of a named key."""
        if scope["path"] not in UNCOUNTED_ROUTES or status >= 400:
            state, caller = scope["state"], scope["state"]["caller"]
            code = state.get("code") or ("ok" if status < 400 else str(status))
            self._metrics.requests.labels(code).inc()
            if caller is not None and caller.key is not None:
                tokens, seconds = state.get("tokens", 0), time.monotonic() - state["received"]
                self._metrics.key_requests.labels(caller.name, code).inc()
                self._metrics.key_tokens.labels(caller.name).inc(tokens)
                line = "key %s: %r %s, %d tokens, %.3f s, request %s"
                values = (scope["path"], code, tokens, seconds, state["request_id"])
                access.info(line, caller.name, *values)


def _safe_id(headers: Headers, name: str) -> str:
    """The caller's id for its request; empty if it has none that is safe to log."""
    value = headers.get(name, "")
    return value if _SAFE_ID.fullmatch(value) else ""


@lru_cache(maxsize=4)  # computing it takes longer than refusing a request
def _fingerprint(identity: SpaceIdentity) -> str:
    return identity.fingerprint
