"""`KalmEmbeddingFunction` for LanceDB, in its registry as "kalm"."""

from __future__ import annotations

try:
    from lancedb.embeddings import TextEmbeddingFunction, register
except ImportError as error:
    from kalm_integrations.install_hints import install_command

    raise ImportError(
        f"kalm_integrations.lancedb needs lancedb: {install_command('lancedb')}."
    ) from error

from typing import Any

from pydantic import PrivateAttr

from kalm_integrations.adapter import SECRETS, client_from, stored_options
from kalm_integrations.client import KalmClient


@register("kalm")  # type: ignore[no-untyped-call]
class KalmEmbeddingFunction(TextEmbeddingFunction):
    """KaLM, or the embedded engine, as an embedding function of LanceDB.

    `create` takes the arguments of `KalmClient`, or `client=`. A secret is "$var:NAME", or comes
    from the environment. A table stores the arguments with the vectors' identity: opened again, it
    refuses to embed with other vectors.
    """

    max_retries: int = 0  # the client retries
    _client: KalmClient = PrivateAttr()

    def __init__(self, *, client: KalmClient | None = None, **stored: Any) -> None:
        super().__init__()
        self._client = client_from(stored) if client is None else client

    @staticmethod
    def sensitive_keys() -> list[str]:
        return list(SECRETS)

    def safe_model_dump(self) -> dict[str, Any]:
        """What a table stores."""
        variables = {name: self._original_args.get(name) for name in SECRETS}
        named = {name: value for name, value in variables.items() if value is not None}
        return {**named, **stored_options(self._client)}

    def ndims(self) -> int:
        """Dimensions; those of an unknown model are counted in a vector."""
        return self._client.vector_dimensions or len(self.generate_embeddings(["dimensions"])[0])

    def generate_embeddings(self, texts: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Embed documents, with the document instruction."""
        return list(self._client.embed(list(texts), role="document").vectors)

    def compute_query_embeddings(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Embed a query, the first argument, with the query instruction."""
        return list(self._client.embed([args[0]], role="query").vectors)
