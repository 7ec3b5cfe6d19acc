"""backend="http": our server, or any that speaks OpenAI's embeddings API.

A probe of `/v1/models` identifies the server before the first request. Our server gets our fields
and returns packed vectors with its identity. Any other server, also one that refuses the probe, is
an `OpenAIServer`, unless its responses have an identity.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from yarl import URL

from kalm_integrations import tracing
from kalm_integrations.codec import MEDIA_TYPE, unpack
from kalm_integrations.errors import (
    ConfigurationError,
    CorruptedAnswerError,
    DeadlineExceededError,
    IdentityMismatchError,
    InvalidResponseError,
    NotFoundError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.protocol import (
    IDENTITY_HEADER,
    TIMEOUT_HEADER,
    EmbedRequest,
    EmbedResponse,
    ServiceDescription,
    read_warnings,
)
from kalm_integrations.transports import openai_compat
from kalm_integrations.transports.http_pool import HttpPool, HttpResponse
from kalm_integrations.transports.openai_server import OpenAIServer

if TYPE_CHECKING:
    from kalm_integrations.config import ClientConfig

_NUMBER_BYTES: Final = 32  # the most that one number takes in JSON, with its comma
_MAX_DIMENSIONS: Final = 16_384
_MIN_TIMEOUT: Final = 0.001  # seconds; less is not sent
_JSON: Final = json.JSONEncoder(ensure_ascii=False)


class HttpTransport:
    """Sends requests to the server at one base URL: `base_url`, or that of `config`."""

    can_be_cold = True

    def __init__(self, config: ClientConfig, base_url: str | None = None) -> None:
        base_url = base_url or config.base_url
        assert base_url is not None
        self._config = config
        self._pool = HttpPool(api_root(base_url), config)
        self._other = OpenAIServer(config, self._post, self._pool.secrets)
        self._is_kalm: bool | None = None
        """Whether this is our server; None while that is unknown."""
        self._probe: asyncio.Task[ServiceDescription | None] | None = None
        self._callers: Counter[asyncio.Task[ServiceDescription | None]] = Counter()
        """How many wait for each probe."""

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        start = time.monotonic()
        if self._is_kalm is None:
            await self.ensure_ready()
        if not self._is_kalm:
            response = await self._other.embed(request)
            if response is not None:
                return response
            self._is_kalm = True  # these vectors are not used, since they lack their identity
        reply = await self._send(request, start, "embeddings", MEDIA_TYPE)
        if reply.media_type == MEDIA_TYPE:
            return unpack(memoryview(reply.body))
        if reply.media_type == "application/json":
            self._is_kalm = None
            raise IdentityMismatchError("the service no longer reports an identity.")
        raise openai_compat.unexpected_content(reply, self._pool.secrets)

    async def count_tokens(self, request: EmbedRequest) -> list[int]:
        start = time.monotonic()
        if self._is_kalm is None:
            await self.ensure_ready()
        if not self._is_kalm:
            raise ConfigurationError("only our own service counts tokens, and this server is not.")
        reply = await self._send(request, start, "count_tokens", "application/json")
        try:
            if isinstance(counts := json.loads(reply.body)["counts"], list):
                return counts
        except openai_compat.UNREADABLE:
            pass
        counts = None  # a traceback would show it
        raise openai_compat.unexpected_content(reply, self._pool.secrets)

    async def _send(
        self, request: EmbedRequest, start: float, route: str, accept: str
    ) -> HttpResponse:
        """Send a request to a route of our server; `start` is when the caller began to wait."""
        fields: dict[str, Any] = {
            "model": self._config.served_model,
            "input": request.texts,
            "truncate": request.truncate,
            "priority": request.role,
            "embed_dtype": request.dtype,
        }
        if request.dimensions is not None:
            fields["dimensions"] = request.dimensions
        headers = {"Accept": accept}
        if request.timeout is not None:
            timeout = request.timeout - (time.monotonic() - start)
            if timeout < _MIN_TIMEOUT:
                raise DeadlineExceededError("the deadline passed before the request was sent.")
            headers[TIMEOUT_HEADER] = f"{timeout:.3f}"
        reply = await self._post(fields, headers, len(request.texts), route)
        if reply.status != 200:
            raise openai_compat.error_from_response(reply, self._pool.secrets)
        return reply

    async def ensure_ready(self) -> ServiceDescription | None:
        """What the server reports about itself; concurrent callers share one probe."""
        if self._probe is None:
            self._probe = asyncio.create_task(self._identify_server())
            self._probe.add_done_callback(self._probe_done)
        probe = self._probe
        self._callers[probe] += 1
        try:
            return await asyncio.shield(probe)
        except asyncio.CancelledError:
            if self._probe is probe:  # it may never get a response: the next caller sends another
                self._probe = None
            raise
        finally:
            self._callers[probe] -= 1
            if not self._callers[probe]:
                del self._callers[probe]
                probe.cancel()

    async def close(self) -> None:
        for probe in list(self._callers):
            probe.cancel()
        await self._pool.close()

    def _probe_done(self, probe: asyncio.Task[ServiceDescription | None]) -> None:
        if self._probe is probe:
            self._probe = None
        if not probe.cancelled():
            probe.exception()  # retrieved, in case every caller has left

    async def _identify_server(self) -> ServiceDescription | None:
        description = await self._read_models()
        if description is not None and description.identity is not None:
            self._is_kalm = True
        else:
            self._is_kalm = not await self._other.agree()
        return description

    async def _read_models(self) -> ServiceDescription | None:
        """What `/v1/models` reports; None if that says nothing of the server.

        Servers and keys need not allow this route. Whether they embed shows when they embed.
        """
        try:
            reply = await self._pool.request("GET", "models", headers={}, limit=2**20)
        except CorruptedAnswerError:
            raise
        except (ConfigurationError, InvalidResponseError):  # a redirect, or far too long
            return None
        if reply.status != 200 and IDENTITY_HEADER in reply.headers:
            if reply.status == 404:
                raise NotFoundError(f"our server is there, but not at {self._pool.base_url}.")
            raise openai_compat.error_from_response(reply, self._pool.secrets)
        try:
            (model, *_) = json.loads(reply.body)["data"]
            fields = model.get("identity")
            identity = None if fields is None else SpaceIdentity.from_dict(fields)
        except openai_compat.UNREADABLE:
            return None
        return ServiceDescription(identity, read_warnings(model))

    async def _post(
        self,
        fields: dict[str, Any],
        headers: dict[str, str],
        texts: int,
        route: str = "embeddings",
    ) -> HttpResponse:
        return await self._pool.request(
            "POST",
            route,
            body=_JSON.encode(fields).encode(),
            headers={**headers, **tracing.trace_context(), "Content-Type": "application/json"},
            limit=2**20 + texts * _MAX_DIMENSIONS * _NUMBER_BYTES,
            from_kalm=self._is_kalm is True,
        )


def api_root(base_url: str) -> URL:
    """The URL under which `/embeddings` is, whether `base_url` ends with `/v1` or not."""
    url = URL(base_url.rstrip("/"))
    if url.name == "embeddings":  # the full URL of requests, often copied
        url = url.parent
    return url if url.name == "v1" else url / "v1"
