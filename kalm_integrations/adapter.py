"""The base class of the adapters: it holds a `KalmClient`."""

from __future__ import annotations

from typing import Any, TypedDict

from kalm_integrations.client import KalmClient
from kalm_integrations.client_base import ClientBase, client_defaults
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.options import ClientOptions, clear_arguments


class SharedClient(TypedDict, total=False):
    """The argument that excludes those of `KalmClient`."""

    client: KalmClient | None
    """A client to share, instead of its arguments. Default: None."""


def adapter_defaults() -> dict[str, Any]:
    """The default of each argument of an adapter."""
    return {"client": None, **client_defaults()}


class ClientAdapter(ClientBase):
    """A framework's embedding model that embeds with `client`.

    Adapters may share one client, and with it the connections and the limit on concurrent
    requests. Closing any of them closes the client's connections; the next call opens new ones.
    """

    _client: KalmClient

    @property
    def client(self) -> KalmClient:
        return self._client


def client_of(client: KalmClient | None, options: ClientOptions) -> KalmClient:
    """Return `client`, or a new one with `options`.

    Raises:
        ConfigurationError: Both were passed.
    """
    try:
        if client is None:
            return KalmClient(**options)
        if options:
            raise ConfigurationError(
                f"client= and {min(options)}= contradict each other: pass "
                f"client.with_options({min(options)}=...)."
            )
        return client
    finally:
        clear_arguments(options)
