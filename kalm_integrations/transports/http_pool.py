"""HTTP requests over a pool of connections to one server: credentials, redirects, request ids, size
limits and connection errors."""

from __future__ import annotations

import itertools
import socket
import ssl
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import aiohttp
from yarl import URL

from kalm_integrations.errors import (
    ConfigurationError,
    ConnectionFailedError,
    CorruptedAnswerError,
    InvalidResponseError,
    KalmError,
)
from kalm_integrations.native_threads import is_patched, original
from kalm_integrations.protocol import ECHO_HEADER, IDENTITY_HEADER, REQUEST_ID_HEADER
from kalm_integrations.transports.connection_errors import connection_error
from kalm_integrations.transports.proxies import proxy_of, socks_connector
from kalm_integrations.transports.redaction import Hidden, redact, shorten

if TYPE_CHECKING:
    from kalm_integrations.config import ClientConfig

_MAX_REDIRECTS: Final = 50  # Modal redirects every 150 s while a container starts
_READ_BUFFER: Final = 2**20


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A complete response.

    Attributes:
        status: HTTP status.
        headers: Case-insensitive.
        body: Never decompressed.
        request_id: Of the request.
        url: Of the request.
    """

    status: int
    headers: Mapping[str, str] = field(repr=False)  # a server may send back what it got
    body: bytearray = field(repr=False)
    request_id: str
    url: URL

    @property
    def media_type(self) -> str:
        """Without parameters."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()


class _ResponseHead(aiohttp.ClientResponse):
    """Tracebacks with local variables do not show its headers."""

    def __repr__(self) -> str:
        return f"<{self.status}>"


class HttpPool:
    """A pool of connections to one server.

    Args:
        base_url: The root of the API, which ends with `/v1`.
        config: Credentials and timeouts.
    """

    def __init__(self, base_url: URL, config: ClientConfig) -> None:
        prefix = uuid.uuid4().hex[:16]
        self.base_url = base_url
        self._config = config
        self._request_ids = (f"{prefix}{number:016x}" for number in itertools.count())
        self._proxy = proxy = proxy_of(base_url)  # redirects stay on this server
        self._http_proxy = None if proxy is None or proxy.is_socks else proxy.url
        self._proxy_headers: dict[str, str] = {}
        """Of the request to open a tunnel."""
        self._failures: tuple[type[Exception], ...] = (
            aiohttp.ClientError,
            ConnectionError,
            UnicodeError,
        )
        """What a failed request raises."""
        self._headers = _credentials(config)
        secrets = [value.removeprefix("Bearer ") for value in self._headers.values()]
        if proxy is not None and proxy.user:
            header: dict[str, str] = {"Proxy-Authorization": Hidden(proxy.authorization)}
            secrets += [proxy.password, proxy.authorization.removeprefix("Basic ")]
            if self._http_proxy is not None and base_url.scheme == "https":
                self._proxy_headers = header
            elif self._http_proxy is not None:
                self._headers |= header
        self.secrets = [Hidden(secret) for secret in secrets]
        """Redacted in error messages."""
        self._session: aiohttp.ClientSession | None = None
        self._distrusted: aiohttp.ClientSession | None = None
        """The session whose connections got a response to another request."""
        self._closed = False

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str],
        limit: int,
        from_kalm: bool = False,
    ) -> HttpResponse:
        """Send a request and read the whole response, following redirects on the same server.

        Args:
            method: "GET" or "POST".
            path: Below `base_url`.
            body: JSON.
            headers: In addition to credentials and ids.
            limit: Most bytes of the response's body.
            from_kalm: Whether the server is known to echo request ids.

        Raises:
            KalmError: The server was not reached, or the response was cut off, too long, or of
                another request. The response may have any status.
        """
        url = self.base_url / path
        request_id = next(self._request_ids)
        ids = {REQUEST_ID_HEADER: request_id, ECHO_HEADER: request_id}
        headers = {**self._headers, **headers, **ids}
        try:
            for _ in range(_MAX_REDIRECTS):
                async with self._open_session().request(
                    method,
                    url,
                    data=body,
                    headers=headers,
                    allow_redirects=False,
                    proxy=self._http_proxy,
                    proxy_headers=self._proxy_headers,
                ) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        method, body, url = self._redirect(response, method, body, url)
                        continue
                    content = await _read(response, limit)
                reply = HttpResponse(response.status, response.headers, content, request_id, url)
                self._check_echo(reply, from_kalm)
                return reply
        except self._failures as error:
            failure = connection_error(
                error,
                f"{method} {url}",
                url,
                proxy=self._proxy,
                connect_timeout=self._config.connect_timeout,
                secrets=self.secrets,
            )
            # aiohttp's errors hold the request's headers.
            raise failure from ConnectionError(redact(str(error), self.secrets))
        raise ConnectionFailedError(f"more than {_MAX_REDIRECTS} redirects from {url}.")

    async def close(self) -> None:
        """Close all connections. Requests in progress fail."""
        self._closed = True
        for session in (self._session, self._distrusted):
            if session is not None:
                await session.close()

    def _check_echo(self, reply: HttpResponse, from_kalm: bool) -> None:
        """Check that a response of our server belongs to its request; others echo no id."""
        name = ECHO_HEADER
        if name not in reply.headers and (from_kalm or IDENTITY_HEADER in reply.headers):
            name = REQUEST_ID_HEADER
        echoed = reply.headers.get(name, reply.request_id)
        if echoed == reply.request_id:
            return
        echoed = shorten(redact(echoed, self.secrets))
        # Other responses on these connections may be late or duplicated too: from now on each
        # request gets a new connection. Requests in progress keep theirs.
        if self._distrusted is None:
            self._distrusted, self._session = self._session, None
        raise CorruptedAnswerError(
            f"request {reply.request_id} got the response to request {echoed}."
        )

    def _redirect(
        self, response: aiohttp.ClientResponse, method: str, body: bytes | None, url: URL
    ) -> tuple[str, bytes | None, URL]:
        received = Hidden(response.headers.get("Location", ""))
        location = redact(received, self.secrets)
        try:
            target = url.join(URL(location))
            same = target.origin() == url.origin() and not target.user and not target.password
        except ValueError:
            same = False
        if not same:  # which must not get the credentials and texts
            raise ConfigurationError(
                f"{url} redirects to another server, {location}: if that is correct, pass it as "
                "base_url."
            )
        if location == received:  # not with a key, which errors about the new URL would show
            if response.status in (307, 308):
                return method, body, target
            if response.status == 303 or method == "GET":
                return "GET", None, target
        raise ConfigurationError(f"{url} has moved to {target}: correct base_url.")

    def _open_session(self) -> aiohttp.ClientSession:
        if self._closed:
            raise KalmError("the client was closed during the call.")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=self._new_connector(single_use=self._distrusted is not None),
                # The call's deadline governs everything else.
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    connect=self._config.connect_timeout,  # TLS and the proxy included
                    sock_connect=self._config.connect_timeout,
                ),
                response_class=_ResponseHead,
                # aiohttp's 64 KiB would pause and resume the socket several times per response.
                read_bufsize=_READ_BUFFER,
                headers={"Accept-Encoding": "identity"},
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,  # it would also send passwords of ~/.netrc
            )
        return self._session

    def _new_connector(self, *, single_use: bool) -> aiohttp.BaseConnector:
        options: dict[str, Any] = {
            "socket_factory": _new_socket if is_patched() else None,
            "limit": 0,  # the slots of `Session` are the limit
            "force_close": single_use,
            "keepalive_timeout": None if single_use else self._config.keepalive_timeout,
            # aiohttp creates its own on import, and SSL_CERT_FILE may be set later.
            "ssl": ssl.create_default_context() if self.base_url.scheme == "https" else True,
        }
        if self._proxy is None or not self._proxy.is_socks:
            return aiohttp.TCPConnector(**options)
        connector, failures = socks_connector(self._proxy, options)
        self._failures = (*self._failures, *failures)
        return connector


def _new_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket of the standard library: gevent's belong to the hub of one thread."""
    created: socket.socket = original("socket", "socket")(*address[:3])
    return created


def _credentials(config: ClientConfig) -> dict[str, str]:
    headers = {}
    if config.api_key is not None:
        headers["Authorization"] = f"Bearer {config.api_key.get_secret_value()}"
    if config.modal_key is not None and config.modal_secret is not None:
        headers["Modal-Key"] = config.modal_key.get_secret_value()
        headers["Modal-Secret"] = config.modal_secret.get_secret_value()
    return {name: Hidden(value) for name, value in headers.items()}


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytearray:
    """The body, at most `limit` bytes of it, and never decompressed."""
    if response.headers.get("Content-Encoding", "").lower() not in ("", "identity"):
        raise InvalidResponseError("the response is compressed, which was not requested.")
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            raise InvalidResponseError(f"the response is over {limit:,} bytes.")
    return bytearray().join(chunks)
