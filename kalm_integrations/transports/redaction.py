"""What messages and tracebacks may show: short, and without secrets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final
from urllib.parse import quote

_MAX_QUOTED: Final = 200  # characters of a response in an error message


def redact(text: str, secrets: Sequence[str]) -> str:
    """`text` without `secrets`, plain or encoded for JSON or a URL. Redact before shortening:
    otherwise part of a secret may remain."""
    for secret in secrets:
        if len(secret) > 3:  # shorter ones are also words
            for form in (secret, json.dumps(secret)[1:-1], quote(secret), quote(secret, safe="")):
                text = text.replace(form, "***")
    return text


def shorten(text: str) -> str:
    """`text`, cut after 200 characters, without control characters."""
    cut = text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "…"
    return "".join(each if each.isprintable() else " " for each in cut)


class Hidden(str):
    """A string that tracebacks with local variables do not show."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"
