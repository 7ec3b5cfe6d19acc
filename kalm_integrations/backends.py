"""Which service a client uses, and what its URL may be. Only settings are read."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

Backend = Literal["auto", "modal", "http", "local"]
ResolvedBackend = Literal["modal", "http", "local", "transport"]
"""What sends the requests; "transport" is one that the caller passed."""

NO_BACKEND: Final = (
    'backend="auto" found no service to talk to. For a service on Modal install modal (the extra '
    '"modal") and run `modal setup`, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET. For an HTTP '
    "service pass base_url= or set KALM_BASE_URL. For the embedded engine (a small model in this "
    'process, for learning, tests and CI) pass backend="local" or set KALM_BACKEND=local.'
)


def resolve(backend: Backend, base_url: str | None) -> ResolvedBackend:
    """The backend that "auto" stands for, or `backend` itself.

    Raises:
        ValueError: No service is configured.
    """
    if backend == "auto" and base_url is not None:
        return "http"
    if backend == "auto" and not modal_is_configured():
        raise ValueError(NO_BACKEND)
    if backend == "http" and base_url is None and not modal_is_configured():
        raise ValueError(
            'backend="http" needs base_url= or KALM_BASE_URL, or Modal\'s package and a token '
            "to look it up"
        )
    return "modal" if backend == "auto" else backend


def modal_is_configured() -> bool:
    """Whether Modal's package and a token are present."""
    if find_spec("modal") is None:
        return False
    token = "MODAL_TOKEN_ID" in os.environ and "MODAL_TOKEN_SECRET" in os.environ
    in_container = os.environ.get("MODAL_IS_REMOTE") == "1"
    file = Path(os.environ.get("MODAL_CONFIG_PATH") or "~/.modal.toml").expanduser()
    return token or in_container or file.is_file()


def check_url(base_url: str) -> str:
    """Return `base_url`.

    Raises:
        ValueError: It is not the URL of an HTTP service, or contains a credential.
    """
    url = urlsplit(base_url)
    _ = url.port  # raises if it is not a number
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
        raise ValueError("base_url is not like https://host or http://host:8000/v1")
    if url.username is not None or url.password is not None:
        raise ValueError("base_url holds a credential, which logs would show: use api_key=")
    return base_url
