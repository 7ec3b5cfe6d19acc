"""What the adapters share: each holds a `KalmClient`, and stores its arguments without secrets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypedDict

from kalm_integrations.client import KalmClient
from kalm_integrations.client_base import ClientBase, client_defaults
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.identity import VectorIdentity
from kalm_integrations.options import ClientOptions, clear_arguments

# All else only tunes, and LlamaIndex's IngestionPipeline, whose cache is keyed by the dump, would
# embed again for it.
STORED: Final = frozenset(
    {
        "backend",
        "base_url",
        "app_name",
        "class_name",
        "environment_name",
        "model",
        "profile",
        "dimensions",
        "query_instruction",
        "document_instruction",
        "truncate",
        "expected_identity",
    }
)
"""The arguments that decide the vectors, and where they come from."""
SECRETS: Final[tuple[str, ...]] = ("api_key", "modal_key", "modal_secret")


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


def stored_options(client: KalmClient) -> dict[str, Any]:
    """A client as JSON for a framework's own storage: no secrets, and the vectors' identity."""
    config = client.config
    options = {name: getattr(config, name) for name in sorted(STORED & config.model_fields_set)}
    if config.expected_identity is not None and "expected_identity" in options:
        options["expected_identity"] = config.expected_identity.to_dict()
    return {**options, "identity": client.vector_identity.to_dict()}


def client_from(stored: Mapping[str, Any], **secrets: Any) -> KalmClient:
    """The inverse of `stored_options`. Secrets that are not given are read from the environment.

    Raises:
        IdentityMismatchError: Its vectors would not be those of the stored client.
    """
    options = {**stored, **{name: value for name, value in secrets.items() if value is not None}}
    identity = options.pop("identity", None)
    client = KalmClient(**options)
    if identity is not None:
        client.vector_identity.check(VectorIdentity.from_dict(identity))
    return client
