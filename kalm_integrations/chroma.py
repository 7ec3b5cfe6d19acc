"""`KalmEmbeddingFunction` for Chroma."""

from __future__ import annotations

try:
    from chromadb.utils.embedding_functions import register_embedding_function
except ImportError as error:
    from kalm_integrations.install_hints import install_command

    raise ImportError(
        f"kalm_integrations.chroma needs chromadb: {install_command('chroma')}."
    ) from error

from typing import Any, Never, Unpack

from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space

from kalm_integrations.adapter import (
    ClientAdapter,
    SharedClient,
    adapter_defaults,
    client_from,
    client_of,
    stored_options,
)
from kalm_integrations.client import KalmClient
from kalm_integrations.identity import VectorIdentity
from kalm_integrations.options import ClientOptions
from kalm_integrations.prompts import Role
from kalm_integrations.signatures import documented, refuse_positional


@register_embedding_function
@documented(SharedClient, ClientOptions, defaults=adapter_defaults)
class KalmEmbeddingFunction(ClientAdapter, EmbeddingFunction[Documents]):
    """KaLM, or the embedded engine, as an embedding function of Chroma.

    Takes the arguments of `KalmClient`, or `client=`. A collection stores all but the secrets, and
    the vectors' identity: opened again, it refuses to embed with other vectors.
    """

    def __init__(
        self,
        *positional: Never,
        client: KalmClient | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        refuse_positional(type(self), positional)
        self._client = client_of(client, options)

    def __call__(self, input: Documents) -> Embeddings:
        return self._vectors(input, "document")

    def embed_query(self, input: Documents) -> Embeddings:
        """Embed queries, with the query instruction."""
        return self._vectors(input, "query")

    @staticmethod
    def name() -> str:
        return "kalm"

    def default_space(self) -> Space:
        return "cosine"

    def get_config(self) -> dict[str, Any]:
        return stored_options(self._client)

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> KalmEmbeddingFunction:
        return KalmEmbeddingFunction(client=client_from(config))

    def validate_config_update(
        self, old_config: dict[str, Any], new_config: dict[str, Any]
    ) -> None:
        stored = VectorIdentity.from_dict(old_config["identity"])
        VectorIdentity.from_dict(new_config["identity"]).check(stored)

    def _vectors(self, texts: Documents, role: Role) -> Embeddings:
        return list(self._client.embed(texts, role=role).vectors)
