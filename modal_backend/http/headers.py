"""Request headers: the accepted type of the response, and the caller's deadline."""

from __future__ import annotations

import math
from typing import Final

from starlette.datastructures import Headers

from kalm_integrations.codec import MEDIA_TYPE
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.protocol import TIMEOUT_HEADER
from modal_backend.http.schema import quoted

JSON: Final = "application/json"


def prefers_packed(headers: Headers) -> bool:
    """Whether the caller prefers packed vectors to JSON.

    The default is JSON: for equal weights, `*/*`, no header, and if neither type is accepted.
    """
    accept = ",".join(headers.getlist("accept"))
    return _weight(MEDIA_TYPE, accept) > _weight(JSON, accept)


def timeout(headers: Headers) -> float | None:
    """Seconds that the caller waits; None without the header.

    Raises:
        ConfigurationError: It is not a positive number of seconds.
    """
    value = headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigurationError(f"{TIMEOUT_HEADER}: {quoted(value)} is not a number of seconds.")
    return seconds


def _weight(media_type: str, accept: str) -> float:
    """The weight of a media type in an Accept header: that of its most specific range (RFC 9110,
    12.5.1). Malformed ranges are skipped."""
    ranges = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
    weights: dict[str, float] = {}
    for choice in accept.lower().split(","):
        name, *parameters = (part.strip() for part in choice.split(";"))
        values = [part[2:] for part in parameters if part.startswith("q=")]
        try:
            weight = float(values[0]) if values else 1.0
        except ValueError:
            continue
        if name in ranges and 0 <= weight <= 1:
            weights[name] = max(weight, weights.get(name, 0.0))
    return next((weights[name] for name in ranges if name in weights), 0.0)
