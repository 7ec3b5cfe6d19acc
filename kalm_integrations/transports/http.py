"""backend="http": our own server, or any that speaks OpenAI's embeddings API.

A probe of `/v1/models` identifies the server before the first request. Our server gets our fields
and returns packed vectors with its identity; any other server gets OpenAI's fields only and returns
base64. If the probe gets a 404, the responses decide: one with an identity comes from our server.
Any other failure of the probe is raised.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any, Final

from yarl import URL

from kalm_integrations.codec import MEDIA_TYPE, unpack
from kalm_integrations.errors import (
    ConfigurationError,
    DeadlineExceededError,
    IdentityMismatchError,
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

if TYPE_CHECKING:
    from kalm_integrations.config import ClientConfig

_NUMBER_BYTES: Final = 32  # the most that one number takes in JSON, with its comma
_MAX_DIMENSIONS: Final = 16_384
_MIN_TIMEOUT: Final = 0.001  # seconds; less is not sent
_JSON: Final = json.JSONEncoder(ensure_ascii=False)


class HttpTransport:
    """Sends requests to the server at one base URL."""

    can_be_cold = True

    def __init__(self, config: ClientConfig) -> None:
        assert config.base_url is not None
        self._config = config
        self._pool = HttpPool(api_root(config.base_url), config)
        self._is_kalm: bool | None = None
        """Whether this is our server; None while that is unknown."""
        self._probe: asyncio.Task[ServiceDescription | None] | None = None

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        start = time.monotonic()
        if self._is_kalm is None:
            await self.ensure_ready()
        fields: dict[str, Any] = {"model": self._config.served_model, "input": request.texts}
        if request.dimensions is not None:
            fields["dimensions"] = request.dimensions
        if not self._is_kalm:
            response = await self._embed_openai(request, fields)
            if response is not None:
                return response
        fields |= {
            "truncate": request.truncate,
            "priority": request.role,
            "embed_dtype": request.dtype,
        }
        headers = {"Accept": MEDIA_TYPE}
        if request.timeout is not None:
            timeout = request.timeout - (time.monotonic() - start)
            if timeout < _MIN_TIMEOUT:
                raise DeadlineExceededError("the deadline passed before the request was sent.")
            headers[TIMEOUT_HEADER] = f"{timeout:.3f}"
        reply = await self._post(fields, headers, len(request.texts))
        media_type = reply.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if media_type == MEDIA_TYPE:
            return unpack(reply.body)
        if media_type == "application/json":
            self._is_kalm = None
            raise IdentityMismatchError("the service no longer reports an identity.")
        raise openai_compat.unexpected_content(reply, self._pool.secrets)

    async def ensure_ready(self) -> ServiceDescription | None:
        """What the server reports about itself; concurrent callers share one probe."""
        if self._probe is None:
            self._probe = asyncio.create_task(self._identify_server())
            self._probe.add_done_callback(self._probe_done)
        return await asyncio.shield(self._probe)

    async def close(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
        await self._pool.close()

    async def _embed_openai(
        self, request: EmbedRequest, fields: dict[str, Any]
    ) -> EmbedResponse | None:
        """The response of a server that is not ours; None if it turns out to be ours."""
        if request.truncate != "error":
            raise ConfigurationError(
                f"truncate={request.truncate!r} needs our server: {self._pool.base_url} is "
                "another one, and OpenAI's API has no such field."
            )
        plain = fields | {"encoding_format": "base64"}
        reply = await self._post(plain, {"Accept": "application/json"}, len(request.texts))
        if IDENTITY_HEADER in reply.headers:
            # The probe got a 404. These vectors are not used, since they lack their identity.
            self._is_kalm = True
            return None
        return openai_compat.decode(reply, fields["model"], request.dtype, self._pool.secrets)

    def _probe_done(self, probe: asyncio.Task[ServiceDescription | None]) -> None:
        self._probe = None
        if not probe.cancelled():
            probe.exception()  # retrieved, in case every caller has left

    async def _identify_server(self) -> ServiceDescription | None:
        reply = await self._pool.request("GET", "models", headers={}, limit=2**20)
        if reply.status == 404:  # OpenAI-compatible servers need not have this route; ours does
            if IDENTITY_HEADER in reply.headers:  # ours, under another path
                raise NotFoundError(f"our server is there, but not at {self._pool.base_url}.")
            return None  # inconclusive: the response may be a proxy's
        if reply.status != 200:
            raise openai_compat.error_from_response(reply, self._pool.secrets)
        try:
            (model, *_) = json.loads(reply.body)["data"]
            fields = model.get("identity")
            identity = None if fields is None else SpaceIdentity.from_dict(fields)
        except openai_compat.UNREADABLE as error:
            raise openai_compat.unexpected_content(reply, self._pool.secrets) from error
        self._is_kalm = identity is not None
        return ServiceDescription(identity, read_warnings(model))

    async def _post(
        self, fields: dict[str, Any], headers: dict[str, str], texts: int
    ) -> HttpResponse:
        reply = await self._pool.request(
            "POST",
            "embeddings",
            body=_JSON.encode(fields).encode(),
            headers={**headers, "Content-Type": "application/json"},
            limit=2**20 + texts * _MAX_DIMENSIONS * _NUMBER_BYTES,
            from_kalm=self._is_kalm is True,
        )
        if reply.status != 200:
            raise openai_compat.error_from_response(reply, self._pool.secrets)
        return reply


def api_root(base_url: str) -> URL:
    """The URL under which `/embeddings` is, whether `base_url` ends with `/v1` or not."""
    url = URL(base_url.rstrip("/"))
    if url.name == "embeddings":  # the full URL of requests, often copied
        url = url.parent
    return url if url.name == "v1" else url / "v1"
