"""backend="http": our own server, or any that speaks OpenAI's embeddings API.

The first request asks `/v1/models` which server this is. Our server gets our extensions and answers
with packed vectors and its identity; any other gets OpenAI's fields only, and answers in base64.
If the probe fails, the answers decide: one that has an identity is our server's.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from kalm_integrations.codec import (
    ECHO_HEADER,
    IDENTITY_HEADER,
    MEDIA_TYPE,
    REQUEST_ID_HEADER,
    TIMEOUT_HEADER,
    EmbedAnswer,
    EmbedRequest,
    ServiceWarning,
    read_warnings,
    unpack,
)
from kalm_integrations.errors import (
    ConfigurationError,
    ConnectionFailedError,
    CorruptedAnswerError,
    DeadlineExceededError,
    IdentityMismatchError,
    InvalidResponseError,
    KalmError,
    NotFoundError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.transports import openai_compat

if TYPE_CHECKING:
    from kalm_integrations.options import ClientConfig

_MAX_REDIRECTS = 50  # Modal answers 303 every 150 s while a container starts
_MAX_NUMBER = 32  # bytes of one number, written out in JSON with its comma
_MAX_DIMENSIONS = 16_384
_READ_AHEAD = 2**20
_JSON = json.JSONEncoder(ensure_ascii=False)
_SHORTEST = 0.001  # seconds; less is not sent


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    headers: Any
    body: bytearray


class HttpTransport:
    """One pool of connections to one base URL."""

    may_be_cold = True
    may_rest = True

    def __init__(self, settings: ClientConfig) -> None:
        assert settings.base_url is not None
        prefix = uuid.uuid4().hex[:16]
        self._settings = settings
        self._base = api_root(settings.base_url)
        self._embeddings = self._base / "embeddings"
        self._request_ids = (f"{prefix}{number:016x}" for number in itertools.count())
        self._proxy = _proxy(self._base)  # redirects stay on this server
        self._model = settings.served_model
        self._headers = _credentials(settings)
        self._secrets = [value.removeprefix("Bearer ") for value in self._headers.values()]
        if self._proxy is not None and (password := URL(self._proxy).password):
            self._secrets.append(password)
        self._http: aiohttp.ClientSession | None = None
        self._mixed_up: aiohttp.ClientSession | None = None
        """The connections on which an answer came that belongs to another request."""
        self._is_ours: bool | None = None
        """Whether this is our server; None while that is not known."""
        self._probe: asyncio.Task[SpaceIdentity | None] | None = None
        self._closed = False
        self.service_warnings: tuple[ServiceWarning, ...] = ()

    async def embed(self, request: EmbedRequest) -> EmbedAnswer:
        start = time.monotonic()
        if self._is_ours is None:
            await self._identify()
        fields: dict[str, Any] = {"model": self._model, "input": request.texts}
        if request.dimensions is not None:
            fields["dimensions"] = request.dimensions
        if not self._is_ours:
            answer = await self._embed_plainly(request, fields)
            if answer is not None:
                return answer
        fields |= {
            "truncate": request.truncate,
            "priority": request.role,
            "embed_dtype": request.dtype,
        }
        headers = {"Accept": MEDIA_TYPE}
        if request.timeout is not None:
            left = request.timeout - (time.monotonic() - start)
            if left < _SHORTEST:
                raise DeadlineExceededError("the deadline passed before the request was sent.")
            headers[TIMEOUT_HEADER] = f"{left:.3f}"
        reply = await self._post(fields, headers, len(request.texts))
        kind = openai_compat.media_type(reply.headers)
        if kind == MEDIA_TYPE:
            return unpack(reply.body)
        if kind == "application/json":
            self._is_ours = None
            raise IdentityMismatchError(
                "the service answered as ours before, with its identity, and does no longer."
            )
        raise openai_compat.wrong_type(reply.headers, reply.body, self._secrets)

    @property
    def reports_no_identity(self) -> bool:
        return self._is_ours is False

    async def wake(self) -> SpaceIdentity | None:
        return await self._identify()

    async def close(self) -> None:
        self._closed = True
        if self._probe is not None:
            self._probe.cancel()
        for connections in (self._http, self._mixed_up):
            if connections is not None:
                await connections.close()

    async def _embed_plainly(
        self, request: EmbedRequest, fields: dict[str, Any]
    ) -> EmbedAnswer | None:
        """The answer of a server that is not ours; None if it turns out to be ours."""
        if request.truncate != "error":
            raise ConfigurationError(
                f"truncate={request.truncate!r} needs our server: {self._base} is another, and "
                "OpenAI's API has no such field."
            )
        plain = fields | {"encoding_format": "base64"}
        reply = await self._post(plain, {"Accept": "application/json"}, len(request.texts))
        if IDENTITY_HEADER in reply.headers:
            # `/v1/models` failed; these vectors came without their identity and are not used.
            self._is_ours = True
            return None
        return openai_compat.decode(
            reply.headers,
            reply.body,
            model=fields["model"],
            dtype=request.dtype,
            secrets=self._secrets,
        )

    async def _identify(self) -> SpaceIdentity | None:
        """The identity that the server reports; concurrent callers share one probe."""
        if self._probe is None:
            self._probe = asyncio.create_task(self._ask_models())
            self._probe.add_done_callback(self._probed)
        return await asyncio.shield(self._probe)

    def _probed(self, probe: asyncio.Task[SpaceIdentity | None]) -> None:
        self._probe = None
        if not probe.cancelled():
            probe.exception()  # retrieved, should all callers be gone

    async def _ask_models(self) -> SpaceIdentity | None:
        reply = await self._send("GET", self._base / "models", None, {}, 2**20, absent=True)
        if reply.status == 404:  # OpenAI-compatible servers need not have this route; ours does
            if IDENTITY_HEADER in reply.headers:  # ours, under another path
                raise NotFoundError(f"our server is there, but not at {self._base}.")
            return None  # decides nothing: a proxy may have answered
        try:
            (model, *_) = json.loads(reply.body)["data"]
            described = model.get("identity")
            identity = None if described is None else SpaceIdentity.from_dict(described)
        except openai_compat.ODD as error:
            raise openai_compat.wrong_type(reply.headers, reply.body, self._secrets) from error
        self._is_ours = identity is not None
        self.service_warnings = read_warnings(model)
        return identity

    async def _post(self, fields: dict[str, Any], headers: dict[str, str], texts: int) -> _Reply:
        body = _JSON.encode(fields).encode()
        limit = 2**20 + texts * _MAX_DIMENSIONS * _MAX_NUMBER
        headers = {**headers, "Content-Type": "application/json"}
        return await self._send("POST", self._embeddings, body, headers, limit)

    async def _send(
        self,
        method: str,
        url: URL,
        body: bytes | None,
        headers: dict[str, str],
        limit: int,
        *,
        absent: bool = False,
    ) -> _Reply:
        """One request, redirects followed.

        Raises what its status stands for, unless it is 404 and what we ask for may be absent.
        """
        request_id = next(self._request_ids)
        ids = {REQUEST_ID_HEADER: request_id, ECHO_HEADER: request_id}
        ours = {**self._headers, **headers, **ids}
        try:
            for _ in range(_MAX_REDIRECTS):
                async with self._pool().request(
                    method, url, data=body, headers=ours, allow_redirects=False, proxy=self._proxy
                ) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        method, body, url = self._redirected(response, method, body, url)
                        continue
                    reply = _Reply(response.status, response.headers, await _read(response, limit))
                self._check_echo(reply.headers, request_id)
                if reply.status != 200 and not (absent and reply.status == 404):
                    raise openai_compat.error(
                        reply.status, reply.headers, reply.body, self._secrets, request_id
                    )
                return reply
        except aiohttp.ClientConnectorCertificateError as error:
            raise ConfigurationError(
                f"{url.host}: {error.certificate_error}. For a private authority point "
                "SSL_CERT_FILE at its certificate."
            ) from error
        except aiohttp.ClientConnectorSSLError as error:
            if "WRONG_VERSION_NUMBER" not in str(error):
                raise ConnectionFailedError(f"{method} {url}: {error}.") from error
            raise ConfigurationError(
                f"{url.host}:{url.port} answered, but not in TLS: base_url of a server that speaks "
                "plain HTTP begins with http://."
            ) from error
        except UnicodeError as error:
            raise ConfigurationError(f"{url.host} is no name of a host.") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            cause = openai_compat.blot(str(error), self._secrets) or type(error).__name__
            cause = openai_compat.short(cause)  # aiohttp shows what it cannot parse
            # aiohttp's own error would show the request's headers in its repr.
            raise ConnectionFailedError(f"{method} {url}: {cause}.") from ConnectionError(cause)
        raise ConnectionFailedError(f"{_MAX_REDIRECTS} redirects from {url} lead nowhere.")

    def _check_echo(self, headers: Any, request_id: str) -> None:
        """Check that an answer of our server belongs to its request; others echo nothing."""
        echoed = headers.get(ECHO_HEADER)
        if echoed is None and (self._is_ours or IDENTITY_HEADER in headers):
            echoed = headers.get(REQUEST_ID_HEADER)
        if echoed in (None, request_id):
            return
        # What else comes on these connections may be late or doubled too: from now on each
        # request has a connection of its own. Requests in flight keep theirs.
        if self._mixed_up is None:
            self._mixed_up, self._http = self._http, None
        raise CorruptedAnswerError(
            f"request {request_id} got the answer to request {openai_compat.short(echoed)}."
        )

    def _redirected(
        self, response: aiohttp.ClientResponse, method: str, body: bytes | None, url: URL
    ) -> tuple[str, bytes | None, URL]:
        location = response.headers.get("Location", "")
        try:
            target = url.join(URL(location))
            same = target.origin() == url.origin() and not target.user and not target.password
        except ValueError:
            same = False
        if not same:  # credentials and texts stay with the server they were meant for
            shown = openai_compat.blot(location, self._secrets)
            raise ConfigurationError(
                f"{url} redirects to another server, {shown}: if that is right, make it base_url."
            )
        if response.status in (307, 308):
            return method, body, target
        if response.status == 303 or method == "GET":
            return "GET", None, target
        shown = openai_compat.blot(str(target), self._secrets)
        raise ConfigurationError(f"{url} has moved to {shown}: correct base_url.")

    def _pool(self) -> aiohttp.ClientSession:
        if self._closed:
            raise KalmError("the client was closed during the call.")
        if self._http is None:
            apart = self._mixed_up is not None
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,  # the session's slots are the limit
                    force_close=apart,
                    keepalive_timeout=None if apart else self._settings.keepalive_timeout,
                    # aiohttp's own was made on import, and SSL_CERT_FILE may be newer.
                    ssl=ssl.create_default_context() if self._base.scheme == "https" else True,
                ),
                # One deadline, the call's, governs all the rest.
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=self._settings.connect_timeout
                ),
                # So much of an answer may lie there unread before the socket is; aiohttp's 64 KiB
                # would stop and start it several times in each.
                read_bufsize=_READ_AHEAD,
                headers={"Accept-Encoding": "identity"},
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,  # it would also send passwords of ~/.netrc
            )
        return self._http


class _Hidden(str):
    """A header's value; tracebacks that show local variables, aiohttp's too, show stars."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def api_root(base_url: str) -> URL:
    """The URL under which `/embeddings` is, whether `base_url` ends with `/v1` or not."""
    url = URL(base_url.rstrip("/"))
    if url.name == "embeddings":  # where a request goes, often copied
        url = url.parent
    return url if url.name == "v1" else url / "v1"


def _proxy(url: URL) -> str | None:
    """The proxy that the environment (or the system) names for `url`."""
    if proxy_bypass(url.host or ""):
        return None
    return getproxies().get(url.scheme)


def _credentials(settings: ClientConfig) -> dict[str, str]:
    headers = {}
    if settings.api_key is not None:
        headers["Authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
    if settings.modal_key is not None and settings.modal_secret is not None:
        headers["Modal-Key"] = settings.modal_key.get_secret_value()
        headers["Modal-Secret"] = settings.modal_secret.get_secret_value()
    return {name: _Hidden(value) for name, value in headers.items()}


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytearray:
    """The body, never more than `limit` bytes of it, and never decompressed."""
    if response.headers.get("Content-Encoding", "").lower() not in ("", "identity"):
        raise InvalidResponseError("the answer is compressed, which was not asked for.")
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            raise InvalidResponseError(f"the answer is over {limit:,} bytes.")
    return bytearray().join(chunks)
