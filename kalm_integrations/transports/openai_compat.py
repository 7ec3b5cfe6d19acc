"""Translates responses of OpenAI-compatible servers to vectors or `KalmError`s."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from kalm_integrations.errors import (
    AuthenticationError,
    ConfigurationError,
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
from kalm_integrations.transports.http_pool import HttpResponse
from kalm_integrations.transports.redaction import Hidden, redact, shorten

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
_TOO_MUCH: Final = re.compile(
    r"too (long|large|big|many)|exceed|overflow|maximum|\bmax\b|longer|larger|less than|at most"
    r"|reduce|limit|shorten",
    re.IGNORECASE,
)
_OF_TEXT: Final = re.compile(r"token|context|length|input|prompt|sequence|character", re.IGNORECASE)
_GATEWAY: Final = (502, 503, 504, 521, 522, 523, 530)
"""Statuses of a gateway that does not reach the service; those above 504 are Cloudflare's."""
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
    response: HttpResponse, dtype: VectorDtype, secrets: Sequence[str]
) -> tuple[str | None, EmbedResponse]:
    """The model's name, if there is one, and the vectors, in the order of their indices.

    Args:
        response: OpenAI's JSON; each embedding is base64 of float32, or a list of numbers. Without
            any index, the vectors are in the order of the texts.
        dtype: Type of the vectors that are returned.
        secrets: Redacted in error messages.

    Raises:
        InvalidResponseError: Not such a response; an index is missing, duplicated or unknown; or,
            with their rows in `invalid`, some embeddings are missing or of another length.
    """
    content = _parse(response.body)
    if content is None:
        raise unexpected_content(response, secrets)
    model, rows, indices, tokens = content
    if all(index is None for index in indices):
        indices = list(range(len(rows)))
    if sorted(indices, key=str) != sorted(range(len(rows)), key=str):
        raise InvalidResponseError(
            f"the response's indices are not 0 to {len(rows) - 1}, each once: "
            f"{shorten(str(indices))}."
        )
    ordered = [row for _, row in sorted(zip(indices, rows, strict=True), key=lambda pair: pair[0])]
    _check_lengths(ordered)
    with np.errstate(over="ignore"):  # what is not finite is refused by index
        vectors = np.array(ordered, dtype=dtype)
    usage = Usage(tokens=tokens, requests=1)
    return model, EmbedResponse(vectors=vectors, identity=None, usage=usage)


def _parse(
    body: bytearray,
) -> tuple[str | None, list[NDArray[np.float32]], list[Any], int | None] | None:
    """The model's name, rows, indices (of a wrong one its type's name) and the number of tokens;
    None if the response is something else.

    It raises nothing: tracebacks with local variables would show all that the server sent.
    """
    try:
        content = json.loads(body)
        model, items = content.get("model"), content["data"]
        rows = [_vector(item["embedding"]) for item in items]
        indices = [
            index if isinstance(index, int | None) else type(index).__name__
            for index in (item.get("index") for item in items)
        ]
        if not rows:
            return None
        name = Hidden(model) if isinstance(model, str) and model else None
        return name, rows, indices, _tokens(content.get("usage"))
    except UNREADABLE:
        return None


def _check_lengths(rows: Sequence[NDArray[np.float32]]) -> None:
    """Check that all vectors have the length that most of them have."""
    (expected, _), *others = Counter(len(row) for row in rows).most_common()
    if others or not expected:
        raise InvalidResponseError.of(
            [
                InvalidText(
                    index,
                    f"got a vector of {len(row)} dimensions instead of {expected}"
                    if len(row)
                    else "got no vector",
                )
                for index, row in enumerate(rows)
                if len(row) != expected or not len(row)
            ]
        )


def _tokens(usage: Any) -> int | None:
    """The number of tokens that a server reports; None if it reports none."""
    if isinstance(usage, Mapping):
        for name in ("prompt_tokens", "total_tokens"):
            value = usage.get(name)
            if isinstance(value, int | float) and 0 < value < math.inf and value == int(value):
                return int(value)
    return None


def is_about_length(message: str) -> bool:
    """Whether an error message says that a text, or the request, is too long.

    Servers have no common code for it, and some use status 500.
    """
    return _TOO_MUCH.search(message) is not None and _OF_TEXT.search(message) is not None


def error_from_response(response: HttpResponse, secrets: Sequence[str]) -> KalmError:
    """The error in a response other than 200, by its code, else by its status.

    `secrets` are redacted in its message: some servers quote a wrong key.
    """
    body = _error_body(redact(response.body.decode(errors="replace"), secrets))
    status, seconds = response.status, retry_after(response.headers)
    seconds = body.retry_after if seconds is None else seconds
    kind = by_code(body.code)
    is_outage = status in _GATEWAY and kind is None and seconds is None
    if kind is None or kind.status != status:
        default = ServiceUnavailableError if status >= 500 else ConfigurationError
        kind = _BY_STATUS.get(status, default)
    message = shorten(body.message.strip())
    if not issubclass(kind, InvalidInputError):
        source = f" from {response.url}" if is_outage else ""
        request = f"HTTP {status}{source}, request {response.request_id}"
        message = f"{request}: {message or 'no explanation.'}"
    error = ErrorBody(
        code=body.code,
        message=message,
        invalid=tuple(InvalidText(each.index, shorten(each.reason)) for each in body.invalid),
        retry_after=seconds,
    ).to_error(kind)
    if isinstance(error, ServiceUnavailableError):
        error.is_outage = is_outage
    return error


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


def _vector(embedding: Any) -> NDArray[np.float32]:
    """An embedding as an array; empty if it is null, or has numbers that are null."""
    if embedding is None or (isinstance(embedding, list) and None in embedding):
        return np.empty(0, dtype=np.float32)
    if isinstance(embedding, str):
        try:
            return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
        except binascii.Error as error:
            raise ValueError("not base64") from error
    row = np.array(embedding)
    if row.ndim != 1 or row.dtype.kind not in "if":
        raise ValueError("not a list of numbers")
    with np.errstate(over="ignore"):
        return row.astype(np.float32)


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
