"""Who may enter, and what every answer carries: one layer around all routes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kalm_integrations.errors import (
    AuthenticationError,
    KalmError,
    ServiceUnavailableError,
    TransportError,
)
from kalm_integrations.protocol import (
    ECHO_HEADER,
    IDENTITY_HEADER,
    REQUEST_ID_HEADER,
    WARNING_HEADER,
    ServiceWarning,
)
from modal_backend.admission import RETRY_AFTER
from modal_backend.http.metrics import Metrics
from modal_backend.http.schema import error_headers, render_error

log = logging.getLogger(__name__)

OPEN_ROUTES: Final = frozenset({"/health"})
UNCOUNTED_ROUTES: Final = frozenset({"/health", "/ready", "/metrics"})
"""What watches the service is no use of it; refusals are counted all the same."""


RefuseEarly = Callable[[Scope, Headers, Receive], Awaitable[tuple[KalmError | None, Receive]]]


class BearerKeys:
    """The keys that open the door; any of them, so that they can be rotated.

    Args:
        keys: An empty list keeps everybody out until `accept`; None lets everybody in.
    """

    def __init__(self, keys: Sequence[SecretStr] | None) -> None:
        self._digests: list[bytes] | None = None
        if keys is not None:
            self.accept(keys)

    def accept(self, keys: Sequence[SecretStr]) -> None:
        """These keys from now on, and no others. One secret may hold several, with white space
        between them."""
        # Digests have one length, so that comparing them tells nothing about the key.
        self._digests = [
            _digest(one.encode()) for key in keys for one in key.get_secret_value().split()
        ]

    def know(self, authorization: str) -> bool:
        """Whether an Authorization header opens the door."""
        if self._digests is None:
            return True
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip().encode("latin-1"))  # as ASGI's bytes were read
        # Every key is compared, so that time does not tell which one was near.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches) and scheme.lower() == "bearer"


class HttpGuard:
    """Checks the bearer key before anything is read; names the request and the identity.

    Args:
        app: What is behind it.
        keys: Who may enter.
        identity: Gives the fingerprint of the space, for the header of every answer.
        warnings: Gives the service's warnings, for another one.
        metrics: Where requests are counted.
        refuse_early: Gives the error of a request that overload refuses, before the app spends time
            on it, and a `receive` for the app if there is none.
        max_inside: Most requests that are let in at a time, so that they leave another door its
            share; None is no limit.
        stopping: Whether the server is shutting down and takes no new work.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: BearerKeys,
        identity: Callable[[], str | None],
        warnings: Callable[[], Sequence[ServiceWarning]],
        metrics: Metrics,
        refuse_early: RefuseEarly,
        max_inside: int | None,
        stopping: Callable[[], bool],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._keys = keys
        self._identity = identity
        self._warnings = warnings
        self._refuse_early = refuse_early
        self._max_inside = max_inside
        self._inside = 0
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers, REQUEST_ID_HEADER) or uuid.uuid4().hex
        echo = _request_id(headers, ECHO_HEADER)
        scope.setdefault("state", {})["request_id"] = request_id

        started = False

        async def send_with_names(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._count(scope, message["status"])
                answer = MutableHeaders(scope=message)
                if identity := self._identity():
                    answer[IDENTITY_HEADER] = identity
                if warnings := self._warnings():
                    answer[WARNING_HEADER] = ",".join(each.code for each in warnings)
                answer[REQUEST_ID_HEADER] = request_id
                if echo:
                    answer[ECHO_HEADER] = echo
            await send(message)

        admitted = 0
        try:
            refusal, receive = await self._refusal(scope, headers, receive)
            if refusal is not None:
                await _refuse(refusal, scope, receive, send_with_names)
                return
            admitted = 1
            self._inside += admitted
            await self._app(scope, receive, send_with_names)
        except asyncio.CancelledError:
            if not self._stopping():
                raise
            if not started:
                await _refuse(_stopped(), scope, receive, send_with_names)
        except Exception as error:
            # What nobody foresaw: to the log with its traceback, to the caller by its id.
            log.exception("request %s broke", request_id)
            if started:
                raise
            broken = TransportError(f"the service broke; its log has request {request_id}.")
            broken.__cause__ = error
            await _refuse(broken, scope, receive, send_with_names)
        finally:
            self._inside -= admitted

    async def _refusal(
        self, scope: Scope, headers: Headers, receive: Receive
    ) -> tuple[KalmError | None, Receive]:
        """Why a request does not reach the app, if it does not; and a `receive` for the app."""
        known = self._keys.know(headers.get("authorization", ""))
        scope["state"]["authorized"] = known  # read by the server, which may have to close others
        if scope["path"] not in OPEN_ROUTES and not known:
            return AuthenticationError("the bearer key is missing or wrong."), receive
        if self._stopping() and scope["path"] not in OPEN_ROUTES:
            return _stopped(), receive
        overload, receive = await self._refuse_early(scope, headers, receive)
        if overload is None and self._inside == self._max_inside:
            overload = ServiceUnavailableError(
                f"this container has {self._inside} requests over HTTP, which is all it takes; "
                "--concurrency and --max-containers of `kalm deploy` raise that.",
                RETRY_AFTER,
            )
        return overload, receive

    def _count(self, scope: Scope, status: int) -> None:
        """Count the request by its end: an error's code, else "ok" or the status."""
        if scope["path"] not in UNCOUNTED_ROUTES or status >= 400:
            end = scope["state"].get("end") or ("ok" if status < 400 else str(status))
            self._metrics.requests.labels(end).inc()


def _request_id(headers: Headers, name: str) -> str:
    """What a caller names its request; nothing where that is no safe name."""
    given = headers.get(name, "")
    return given if re.fullmatch(r"[\w.-]{1,64}", given) else ""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _stopped() -> KalmError:
    return ServiceUnavailableError("the service is stopping.", RETRY_AFTER)


async def _refuse(error: KalmError, scope: Scope, receive: Receive, send: Send) -> None:
    scope["state"]["end"] = error.code
    answer = Response(render_error(error), error.status, error_headers(error), "application/json")
    await answer(scope, receive, send)
