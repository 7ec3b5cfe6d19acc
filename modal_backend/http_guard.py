"""Who may enter, and what every answer carries: one layer around all routes."""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Sequence
from typing import Final

from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kalm_integrations.errors import AuthenticationError
from kalm_integrations.wire import IDENTITY_HEADER, REQUEST_ID_HEADER
from modal_backend.openai_schema import render_error

OPEN_ROUTES: Final = frozenset({"/health"})


class HttpGuard:
    """Checks the bearer key before anything is read; names the request and the identity.

    Args:
        app: What is behind it.
        api_keys: See `create_app`.
        identity: Fingerprint of the space, for the header of every answer.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[SecretStr], identity: str) -> None:
        self._app = app
        # Digests have one length, so that comparing them tells nothing about the key.
        self._digests = [_digest(key.get_secret_value()) for key in api_keys]
        self._identity = identity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get(REQUEST_ID_HEADER, "")
        if not re.fullmatch(r"[\w.-]{1,64}", request_id):
            request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_names(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer[IDENTITY_HEADER] = self._identity
                answer[REQUEST_ID_HEADER] = request_id
            await send(message)

        if scope["path"] not in OPEN_ROUTES and not self._knows(headers.get("authorization", "")):
            refusal = Response(
                render_error(AuthenticationError("the bearer key is missing or wrong.")),
                status_code=401,
                media_type="application/json",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refusal(scope, receive, send_with_names)
            return
        await self._app(scope, receive, send_with_names)

    def _knows(self, authorization: str) -> bool:
        if not self._digests:
            return True
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        # Every key is compared, so that time does not tell which one was near.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches) and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
