"""`kalm serve`: the HTTP door on this machine."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import Literal

import uvicorn
from pydantic import SecretStr

from kalm_integrations.errors import ConfigurationError
from modal_backend.engines.embedded import EmbeddedEngine
from modal_backend.http_api import create_app
from modal_backend.http_guard import BearerKeys
from modal_backend.service import EmbeddingService

EngineName = Literal["embedded"]

_GRACE = 10  # seconds that answers in progress have to finish


def serve(
    engine: EngineName, host: str, port: int, api_key: SecretStr | None, *, insecure: bool
) -> None:
    """Serve until interrupted.

    Args:
        engine: Which engine to load.
        host: Address to listen on.
        port: Port to listen on.
        api_key: What callers must present.
        insecure: Serve without a key. On a loopback address only.

    Raises:
        ConfigurationError: Neither a key nor `insecure`, or `insecure` for other machines.
        EngineLoadError: The engine cannot be loaded.
    """
    if api_key is not None and not api_key.get_secret_value().strip():
        api_key = None
    if api_key is None and not insecure:
        raise ConfigurationError(
            "a service without a key is open to everybody. Set KALM_API_KEY (for instance to the "
            "output of `openssl rand -hex 32`), or pass --insecure-no-auth to serve this machine "
            "only."
        )
    if api_key is None and not _is_loopback(host):
        raise ConfigurationError(f"--insecure-no-auth is for 127.0.0.1 only, not for {host}.")
    assert engine == "embedded"
    service = EmbeddingService(EmbeddedEngine.load())
    app = create_app(service, keys=BearerKeys([api_key] if api_key else None))
    try:
        uvicorn.run(
            app, host=host, port=port, timeout_graceful_shutdown=_GRACE, server_header=False
        )
    finally:
        asyncio.run(service.close())


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
