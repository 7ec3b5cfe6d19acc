"""Translates responses of OpenAI-compatible servers to vectors or `KalmError`s."""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Final

import numpy as np
from pydantic import ValidationError

from kalm_integrations.errors import (
    AuthenticationError,
    ConfigurationError,
    IdentityMismatchError,
    InvalidInputError,
    InvalidResponseError,
    InvalidText,
    KalmError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTooLargeError,
    ServiceUnavailableError,
    by_code,
)
from kalm_integrations.protocol import EmbedResponse, ErrorBody, VectorDtype
from kalm_integrations.result import Usage
from kalm_integrations.transports.http_pool import HttpResponse, redact, shorten

_BY_STATUS: Final = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    405: NotFoundError,
    408: ServiceUnavailableError,
    409: ServiceUnavailableError,
    413: RequestTooLargeError,
    425: ServiceUnavailableError,
    429: RateLimitError,
}
"""For responses without one of our codes."""
UNREADABLE: Final = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""Exceptions of reading JSON of unknown content."""


def decode(
    response: HttpResponse, model: str, dtype: VectorDtype, secrets: Sequence[str]
) -> EmbedResponse:
    """The vectors of an embeddings response, in the order of their indices.

    Args:
        response: OpenAI's JSON; each embedding is base64 of float32, or a list of numbers.
        model: The requested model.
        dtype: Type of the vectors that are returned.
        secrets: Redacted in error messages.

    Raises:
        IdentityMismatchError: The vectors are of another model.
        InvalidResponseError: Not such a response; or an index is missing, duplicated or unknown.
    """
    try:
        content = json.loads(response.body)
        served, items = content["model"], content["data"]
        rows = {item["index"]: _vector(item["embedding"]) for item in items}
        tokens = int(content["usage"]["prompt_tokens"])
    except UNREADABLE as error:
        raise unexpected_content(response, secrets) from error
    if served != model:
        raise IdentityMismatchError(
            f"requested model {model!r}, but {shorten(redact(str(served), secrets))!r} answered."
        )
    if len(rows) != len(items) or set(rows) != set(range(len(rows))):
        raise InvalidResponseError(
            f"the response's indices are not 0 to {len(items) - 1}, each once: "
            f"{shorten(str([item['index'] for item in items]))}."
        )
    if len({row.shape for row in rows.values()}) > 1:
        raise InvalidResponseError("the response's vectors have different dimensions.")
    vectors = np.array([rows[index] for index in range(len(rows))], dtype=dtype)
    return EmbedResponse(vectors=vectors, identity=None, usage=Usage(tokens=tokens, requests=1))


def error_from_response(response: HttpResponse, secrets: Sequence[str]) -> KalmError:
    """The error in a response other than 200, by its code, else by its status.

    `secrets` are redacted in its message: some servers quote a wrong key.
    """
    body = _error_body(redact(response.body.decode(errors="replace"), secrets))
    status = response.status
    kind = by_code(body.code)
    if kind is None or kind.status != status:
        default = ServiceUnavailableError if status >= 500 else ConfigurationError
        kind = _BY_STATUS.get(status, default)
    message = shorten(body.message.strip())
    seconds = retry_after(response.headers)
    if not issubclass(kind, InvalidInputError):
        message = f"HTTP {status}, request {response.request_id}: {message or 'no explanation.'}"
    return ErrorBody(
        code=body.code,
        message=message,
        invalid=tuple(InvalidText(each.index, shorten(each.reason)) for each in body.invalid),
        retry_after=body.retry_after if seconds is None else seconds,
    ).to_error(kind)


def unexpected_content(response: HttpResponse, secrets: Sequence[str]) -> InvalidResponseError:
    """The error for a response with status 200 but without embeddings, such as a login page."""
    content_type = redact(response.headers.get("Content-Type", "no type"), secrets)
    excerpt = _excerpt(redact(response.body.decode(errors="replace"), secrets))
    return InvalidResponseError(
        f"the response is not embeddings but {shorten(content_type)}: {excerpt}."
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from Retry-After-Ms or Retry-After (seconds or a date); None without."""
    value = headers.get("Retry-After", "")
    for text, seconds in ((headers.get("Retry-After-Ms", ""), 0.001), (value, 1.0)):
        try:
            return seconds * float(text)
        except ValueError:
            continue
    try:
        return parsedate_to_datetime(value).timestamp() - time.time()
    except UNREADABLE:
        return None


def _vector(embedding: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    if isinstance(embedding, str):
        try:
            return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
        except binascii.Error as error:
            raise ValueError("not base64") from error
    return np.array(embedding, dtype=np.float32)


def _error_body(text: str) -> ErrorBody:
    """The error in a response's body; an excerpt of the body if there is none."""
    try:
        content = json.loads(text)
        fields = content.get("error", content)
        message, code = fields["message"], fields.get("code")
        if not isinstance(message, str):
            raise TypeError(message)
    except UNREADABLE:
        return ErrorBody(code="", message=_excerpt(text))
    try:
        return ErrorBody(
            code=code,
            message=message,
            invalid=fields.get("invalid") or (),
            retry_after=fields.get("retry_after"),
        )
    except ValidationError:  # of another server, with other fields
        return ErrorBody(code=code if isinstance(code, str) else "", message=message)


def _excerpt(body: str) -> str:
    text = body[:4096]
    if title := re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL):
        text = f"the page {title[1].strip()!r}"
    return shorten(re.sub(r"\s+", " ", text).strip()) or "an empty body"
