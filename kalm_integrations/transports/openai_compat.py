"""What an OpenAI-compatible server says, in our terms: vectors, or one of our errors."""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import quote

import numpy as np

from kalm_integrations.codec import EmbedAnswer, VectorDtype
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
from kalm_integrations.result import Usage

_BY_STATUS: Final[dict[int, type[KalmError]]] = {
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
ODD: Final = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading a stranger's JSON may raise."""
_SHOWN = 200  # characters of a body in an error message


def decode(
    headers: Mapping[str, str],
    body: bytes | bytearray,
    *,
    model: str,
    dtype: VectorDtype,
    secrets: Sequence[str] = (),
) -> EmbedAnswer:
    """The vectors of an embeddings answer, in the order of their indices.

    Args:
        headers: Of the answer.
        body: OpenAI's JSON; each embedding is base64 of float32, or a list of numbers.
        model: That was asked for.
        dtype: To convert to.
        secrets: Blotted out of what an error message shows.

    Raises:
        IdentityMismatchError: Another model answered.
        InvalidResponseError: Not such an answer; a missing, doubled or unknown index.
    """
    try:
        answer = json.loads(body)
        served, items = answer["model"], answer["data"]
        rows = {item["index"]: _vector(item["embedding"]) for item in items}
        tokens = int(answer["usage"]["prompt_tokens"])
    except ODD as error:
        raise wrong_type(headers, body, secrets) from error
    if served != model:
        raise IdentityMismatchError(
            f"asked model {model!r}, but {short(blot(str(served), secrets))!r} answered."
        )
    if len(rows) != len(items) or set(rows) != set(range(len(rows))):
        raise InvalidResponseError(
            f"the answer's indices are not 0 to {len(items) - 1}, each once: "
            f"{short(str([item['index'] for item in items]))}."
        )
    if len({row.shape for row in rows.values()}) > 1:
        raise InvalidResponseError("the answer's vectors have different dimensions.")
    vectors = np.array([rows[index] for index in range(len(rows))], dtype=dtype)
    return EmbedAnswer(vectors=vectors, identity=None, usage=Usage(tokens=tokens, requests=1))


def error(
    status: int,
    headers: Mapping[str, str],
    body: bytes | bytearray,
    secrets: Sequence[str],
    request_id: str,
) -> KalmError:
    """What an answer that is not 200 stands for, by its code, else by its status.

    `secrets` are blotted out of what the server says: some servers repeat a wrong key.
    """
    said, code, invalid = _read_error(blot(body.decode(errors="replace"), secrets))
    kind = by_code(code)
    if kind is None or kind.status != status:
        default = ServiceUnavailableError if status >= 500 else ConfigurationError
        kind = _BY_STATUS.get(status, default)
    said = short(said.strip())
    if issubclass(kind, InvalidInputError | InvalidResponseError) and invalid:
        return kind.of(invalid)
    if issubclass(kind, InvalidInputError):
        return kind(said)
    message = f"HTTP {status}, request {request_id}: {said or 'no explanation.'}"
    if issubclass(kind, ServiceUnavailableError):
        return kind(message, retry_after(headers))
    return kind(message)


def wrong_type(
    headers: Mapping[str, str], body: bytes | bytearray, secrets: Sequence[str]
) -> InvalidResponseError:
    """For an answer that is 200 and yet no embeddings: a login page, a cut-off document."""
    kind = blot(headers.get("Content-Type", "no type"), secrets)
    shown = _snippet(blot(body.decode(errors="replace"), secrets))
    return InvalidResponseError(f"the answer is not embeddings but {short(kind)}: {shown}.")


def blot(text: str, secrets: Sequence[str]) -> str:
    """`text` without `secrets`, plain or as JSON or a URL writes them. To be done before text is
    cut, or half of one stays.
    """
    for secret in (secret for secret in secrets if len(secret) > 3):  # shorter ones are words
        for form in (secret, json.dumps(secret)[1:-1], quote(secret), quote(secret, safe="")):
            text = text.replace(form, "***")
    return text


def media_type(headers: Mapping[str, str]) -> str:
    """The Content-Type without its parameters."""
    return headers.get("Content-Type", "").partition(";")[0].strip().lower()


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by Retry-After-Ms, which some servers send beside it, or by Retry-After, in
    seconds or as a date; None without either."""
    value = headers.get("Retry-After", "")
    for text, seconds in ((headers.get("Retry-After-Ms", ""), 0.001), (value, 1.0)):
        try:
            return max(0.0, seconds * float(text))
        except ValueError:
            continue
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ODD:
        return None


def _vector(embedding: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    if isinstance(embedding, str):
        try:
            return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
        except binascii.Error as error:
            raise ValueError("not base64") from error
    return np.array(embedding, dtype=np.float32)


def _read_error(body: str) -> tuple[str, str | None, list[InvalidText]]:
    """Message, code and texts of an error body; what it is not is shown as it is."""
    try:
        content = json.loads(body)
    except ODD:
        return _snippet(body), None, []
    detail = content.get("error", content) if isinstance(content, dict) else content
    if not isinstance(detail, dict) or not isinstance(detail.get("message"), str):
        return _snippet(body), None, []
    listed = detail.get("invalid")
    invalid = [
        InvalidText(bad["index"], short(bad["reason"]))
        for bad in (listed if isinstance(listed, list) else [])
        if isinstance(bad, dict)
        and type(bad.get("index")) is int
        and isinstance(bad.get("reason"), str)
    ]
    code = detail.get("code")
    return detail["message"], code if isinstance(code, str) else None, invalid


def _snippet(body: str) -> str:
    text = body[:4096]
    if title := re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL):
        text = f"the page {title[1].strip()!r}"
    return short(re.sub(r"\s+", " ", text).strip()) or "an empty body"


def short(text: str) -> str:
    """At most 200 characters of `text`."""
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
