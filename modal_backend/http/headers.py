"""What a caller's headers ask for: the type of the answer, and how long the caller waits."""

from __future__ import annotations

import math
from typing import Final

from starlette.datastructures import Headers

from kalm_integrations.codec import MEDIA_TYPE
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.protocol import TIMEOUT_HEADER

JSON: Final = "application/json"
_MOST_ECHOED: Final = 200


def prefers_packed(headers: Headers) -> bool:
    """Whether the answer goes out as packed vectors: they have a higher weight than JSON.

    JSON is the answer to a tie, to `*/*`, to no header, and where neither is accepted.
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


def quoted(value: str) -> str:
    """`value` for a message: in quotes, and cut where nobody would read on."""
    if len(value) <= _MOST_ECHOED:
        return repr(value)
    return f"{value[:_MOST_ECHOED]!r}... ({len(value):,} characters)"


def _weight(kind: str, accept: str) -> float:
    """What `accept` says about a media type: the weight of the most specific range (RFC 9110,
    12.5.1). A range that cannot be read is skipped."""
    ranges = (kind, f"{kind.partition('/')[0]}/*", "*/*")
    found: dict[str, float] = {}
    for choice in accept.lower().split(","):
        name, *parameters = (part.strip() for part in choice.split(";"))
        weights = [part[2:] for part in parameters if part.startswith("q=")]
        try:
            weight = float(weights[0]) if weights else 1.0
        except ValueError:
            continue
        if name in ranges and 0 <= weight <= 1:
            found[name] = max(weight, found.get(name, 0.0))
    return next((found[name] for name in ranges if name in found), 0.0)
