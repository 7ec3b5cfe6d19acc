"""backend="http": our own server, or any that speaks OpenAI's embeddings API.

The first request of a session asks `/v1/models` whom it talks to. Our server gets our extensions
and answers with packed vectors and its identity; any other gets OpenAI's fields only, and base64.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
from yarl import URL

from kalm_integrations.errors import (
    ConfigurationError,
    ConnectionFailedError,
    InvalidResponseError,
    NotFoundError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.transports import openai_answers
from kalm_integrations.wire import (
    MEDIA_TYPE,
    REQUEST_ID_HEADER,
    TIMEOUT_HEADER,
    EmbedAnswer,
    EmbedRequest,
    unpack,
)

if TYPE_CHECKING:
    from kalm_integrations.settings import ClientSettings

_MAX_REDIRECTS = 50  # Modal answers 303 every 150 s while a container starts
_MAX_NUMBER = 32  # bytes of one number, written out in JSON with its comma
_MAX_DIMENSIONS = 16_384


@dataclass(frozen=True, slots=True)
class _Server:
    """Who answers. `identity` is None for a server that is not ours."""

    identity: SpaceIdentity | None


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    headers: Any
    body: bytes


class HttpTransport:
    """One pool of connections to one base URL."""

    def __init__(self, settings: ClientSettings) -> None:
        assert settings.base_url is not None
        self._settings = settings
        self._base = api_root(settings.base_url)
        self._headers = _credentials(settings)
        self._http: aiohttp.ClientSession | None = None
        self._server: _Server | None = None
        self._asking = asyncio.Lock()

    async def embed(self, request: EmbedRequest) -> EmbedAnswer:
        server = await self._who()
        fields: dict[str, Any] = {"model": self._settings.served_model, "input": request.texts}
        if request.dimensions is not None:
            fields["dimensions"] = request.dimensions
        if server.identity is None:
            return await self._embed_plainly(request, fields)
        fields |= {
            "truncate": request.truncate,
            "priority": request.role,
            "embed_dtype": request.dtype,
        }
        headers = {"Accept": MEDIA_TYPE}
        if request.timeout is not None:
            headers[TIMEOUT_HEADER] = f"{request.timeout:.3f}"
        reply = await self._post(fields, headers, len(request.texts))
        if reply.headers.get("Content-Type") != MEDIA_TYPE:
            raise openai_answers.wrong_type(reply.headers, reply.body)
        return unpack(reply.body)

    async def wake(self) -> SpaceIdentity | None:
        return (await self._who()).identity

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()

    async def _embed_plainly(self, request: EmbedRequest, fields: dict[str, Any]) -> EmbedAnswer:
        if request.truncate != "error":
            raise ConfigurationError(
                f"truncate={request.truncate!r} needs our server: {self._base} is another, and "
                "OpenAI's API has no such field."
            )
        fields["encoding_format"] = "base64"
        reply = await self._post(fields, {"Accept": "application/json"}, len(request.texts))
        return openai_answers.decode(
            reply.headers, reply.body, model=fields["model"], dtype=request.dtype
        )

    async def _who(self) -> _Server:
        async with self._asking:
            if self._server is None:
                self._server = await self._ask_who()
            return self._server

    async def _ask_who(self) -> _Server:
        try:
            reply = await self._send("GET", self._base / "models", None, {}, 2**20)
        except NotFoundError:  # OpenAI-compatible servers need not have this route
            return _Server(None)
        try:
            (model, *_) = json.loads(reply.body)["data"]
            described = model.get("identity")
            return _Server(None if described is None else SpaceIdentity.from_dict(described))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise openai_answers.wrong_type(reply.headers, reply.body) from error

    async def _post(self, fields: dict[str, Any], headers: dict[str, str], texts: int) -> _Reply:
        body = json.dumps(fields, ensure_ascii=False).encode()
        limit = 2**20 + texts * _MAX_DIMENSIONS * _MAX_NUMBER
        headers = {**headers, "Content-Type": "application/json"}
        return await self._send("POST", self._base / "embeddings", body, headers, limit)

    async def _send(
        self, method: str, url: URL, body: bytes | None, headers: dict[str, str], limit: int
    ) -> _Reply:
        """One request, redirects followed. Raises what its status stands for."""
        request_id = uuid.uuid4().hex
        ours = {**self._headers, **headers, REQUEST_ID_HEADER: request_id}
        try:
            for _ in range(_MAX_REDIRECTS):
                async with self._pool().request(
                    method, url, data=body, headers=ours, allow_redirects=False
                ) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        method, body, url = self._redirected(response, method, body, url)
                        continue
                    reply = _Reply(response.status, response.headers, await _read(response, limit))
                if reply.status != 200:
                    raise openai_answers.error(
                        reply.status, reply.headers, reply.body, self._secrets(), request_id
                    )
                return reply
        except aiohttp.ClientConnectorCertificateError as error:
            raise ConfigurationError(
                f"{url.host}: {error.certificate_error}. For a private authority point "
                "SSL_CERT_FILE at its certificate."
            ) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ConnectionFailedError(
                f"{method} {url}: {error or type(error).__name__}."
            ) from error
        raise ConnectionFailedError(f"{_MAX_REDIRECTS} redirects from {url} lead nowhere.")

    def _redirected(
        self, response: aiohttp.ClientResponse, method: str, body: bytes | None, url: URL
    ) -> tuple[str, bytes | None, URL]:
        target = url.join(URL(response.headers.get("Location", "")))
        # Credentials and texts stay with the server they were meant for.
        if target.origin() != url.origin():
            raise ConfigurationError(
                f"{url} redirects to another server, {target.origin()}: if that is right, make it "
                "base_url."
            )
        if response.status in (307, 308):
            return method, body, target
        if response.status == 303 or method == "GET":
            return "GET", None, target
        raise ConfigurationError(f"{url} has moved to {target}: correct base_url.")

    def _pool(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,  # the session's slots are the limit
                    # aiohttp's own was made on import, and SSL_CERT_FILE may be newer.
                    ssl=ssl.create_default_context() if self._base.scheme == "https" else True,
                ),
                # One deadline, the call's, governs all the rest.
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=self._settings.connect_timeout
                ),
                headers={"Accept-Encoding": "identity"},
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=True,
            )
        return self._http

    def _secrets(self) -> list[str]:
        return [secret.removeprefix("Bearer ") for secret in self._headers.values()]


def api_root(base_url: str) -> URL:
    """The URL under which `/embeddings` is, whether `base_url` ends with `/v1` or not."""
    url = URL(base_url.rstrip("/"))
    return url if url.name == "v1" else url / "v1"


def _credentials(settings: ClientSettings) -> dict[str, str]:
    headers = {}
    if settings.api_key is not None:
        headers["Authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
    if settings.modal_key is not None and settings.modal_secret is not None:
        headers["Modal-Key"] = settings.modal_key.get_secret_value()
        headers["Modal-Secret"] = settings.modal_secret.get_secret_value()
    return headers


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body, never more than `limit` bytes of it, and never decompressed."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise InvalidResponseError("the answer is compressed, which was not asked for.")
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit:
            raise InvalidResponseError(f"the answer is over {limit:,} bytes.")
    return bytes(body)
