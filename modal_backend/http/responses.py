"""Responses of the HTTP API: their bodies as models, vectors as JSON, errors."""

from __future__ import annotations

import asyncio
import binascii
import math
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Final, Literal, Self

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, JsonValue
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from kalm_integrations.errors import KalmError, ServiceUnavailableError
from kalm_integrations.protocol import EmbedResponse, ErrorBody, ServiceWarning
from modal_backend.service import EmbeddingService

Part = bytes | memoryview
_ROWS_PER_PART: Final = 8
_MAX_MESSAGE: Final = 700


class ResponseBody(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_serialization_defaults_required=True,
    )


class Model(ResponseBody):
    """The served model."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "kalm-integrations"
    identity: dict[str, JsonValue]
    """What makes its vectors comparable."""
    fingerprint: str
    """Fingerprint of the identity."""
    dimensions: tuple[int, ...]
    """The native number first."""
    max_tokens: int
    """Tokens of the longest text."""
    warnings: tuple[ServiceWarning, ...]
    """Problems that an operator has to fix; see docs/troubleshooting.md."""

    @classmethod
    def of(cls, service: EmbeddingService) -> Self:
        """The model that `service` serves."""
        return cls(
            id=service.identity.model,
            identity=service.identity.to_dict(),
            fingerprint=service.identity.fingerprint,
            dimensions=service.dimensions,
            max_tokens=service.max_tokens,
            warnings=service.warnings,
        )


class Models(ResponseBody):
    """A list of the one served model."""

    object: Literal["list"] = "list"
    data: tuple[Model, ...]


class TokenCounts(ResponseBody):
    """The tokens of each text, instruction and special tokens included, before it is cut."""

    model: str
    counts: tuple[int, ...]
    """In the order of `input`. Above `max_tokens`, the number may be an estimate."""
    max_tokens: int
    """Tokens of the longest text that is read whole."""


class Status(ResponseBody):
    """Reports that all is well."""

    status: str


class OpenAIError(ResponseBody, ErrorBody):
    """OpenAI's fields, and two of ours: `invalid` lists the texts that cannot be embedded, by index
    in `input`; after `retry_after` seconds a retry may succeed. `code` is stable; docs/errors.md
    lists them."""

    type: Literal["invalid_request_error", "server_error"] = "server_error"
    param: str | None = None

    @classmethod
    def of(cls, error: KalmError) -> Self:
        """The body that describes `error`."""
        message = error.message  # it may quote a field or header of any length
        if len(message) > _MAX_MESSAGE:
            message = f"{message[: _MAX_MESSAGE // 2]} ... {message[-_MAX_MESSAGE // 2 :]}"
        invalid = getattr(error, "invalid", ())
        return cls.model_construct(  # not validated: an overload sends thousands
            code=error.code,
            message=message,
            invalid=invalid,
            retry_after=getattr(error, "retry_after", None),
            type="invalid_request_error" if error.status < 500 else "server_error",
            param=f"input[{invalid[0].index}]" if invalid else None,
        )


class OpenAIErrorBody(ResponseBody):
    """An error."""

    error: OpenAIError


class ErrorResponse(Response):
    """An error as OpenAI's JSON.

    Args:
        error: The error; `/metrics` counts the request under its code.
        status: By default the error's own.
        headers: By default those of `error_headers`.
    """

    media_type = "application/json"

    def __init__(
        self, error: KalmError, status: int | None = None, headers: dict[str, str] | None = None
    ) -> None:
        self._code = error.code
        body = f'{{"error":{OpenAIError.of(error).model_dump_json()}}}'
        headers = error_headers(error) if headers is None else headers
        super().__init__(body, status or error.status, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["code"] = self._code
        await super().__call__(scope, receive, send)


def error_headers(error: KalmError) -> dict[str, str]:
    """Headers of an error: how to authenticate, or when to retry."""
    if error.status == 401:
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, ServiceUnavailableError) and error.retry_after is not None:
        return {
            "Retry-After": str(math.ceil(error.retry_after)),
            # OpenAI's servers send it and its clients prefer it: it is not rounded to a second.
            "Retry-After-Ms": str(math.ceil(1000 * error.retry_after)),
        }
    return {}


def response_of(parts: Iterable[Part], media_type: str, *, whole: bool) -> Response:
    """A response that is sent at once, or part by part so that the event loop does other work in
    between."""
    if whole:
        return Response(b"".join(parts), media_type=media_type)
    return StreamingResponse(_one_by_one(parts), media_type=media_type)


async def _one_by_one(parts: Iterable[Part]) -> AsyncIterator[Part]:
    for part in parts:
        yield part
        await asyncio.sleep(0)


def embeddings_json(response: EmbedResponse, encoding_format: str) -> Iterator[bytes]:
    """A response as OpenAI's JSON (`openapi.Embeddings`): vectors as lists of numbers, or as base64
    of little-endian float32. Written by hand, in parts none of which takes long."""
    rows = response.vectors.astype("<f4", copy=False)
    encode = _base64 if encoding_format == "base64" else _numbers
    yield b'{"object":"list","data":['
    for start in range(0, len(rows), _ROWS_PER_PART):
        items = (
            b'{"object":"embedding","index":%d,"embedding":%b}' % (index, encode(row))
            for index, row in enumerate(rows[start : start + _ROWS_PER_PART], start)
        )
        yield (b"," if start else b"") + b",".join(items)
    tokens = response.usage.tokens or 0
    model = orjson.dumps(response.identity.model if response.identity else "")
    usage = b'{"prompt_tokens":%d,"total_tokens":%d}' % (tokens, tokens)
    truncated = orjson.dumps(response.truncated or ())
    yield b'],"model":%b,"usage":%b,"truncated":%b}' % (model, usage, truncated)


def _base64(row: NDArray[np.float32]) -> bytes:
    return b'"%b"' % binascii.b2a_base64(row.data, newline=False)


def _numbers(row: NDArray[np.float32]) -> bytes:
    return orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)
