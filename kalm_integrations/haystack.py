"""`KalmTextEmbedder` and `KalmDocumentEmbedder` for Haystack."""

from __future__ import annotations

try:
    from haystack import Document, component, default_to_dict
except ImportError as error:
    from kalm_integrations.install_hints import install_command

    needed = f"kalm_integrations.haystack needs haystack-ai: {install_command('haystack')}."
    raise ImportError(needed) from error

from dataclasses import replace
from typing import Any, Self

from haystack.utils import Secret, deserialize_secrets_inplace

from kalm_integrations.adapter import SECRETS, client_from, client_of, stored_options
from kalm_integrations.client import KalmClient


class _Embedder:
    """Takes the arguments of `KalmClient`, secrets as Haystack's `Secret`; or `client=`."""

    def __init__(self, *, client: KalmClient | None = None, **options: Any) -> None:
        self._secrets = {name: options[name] for name in SECRETS if options.get(name) is not None}
        self.client = client_of(client, {**options, **_resolved(self._secrets)})  # type: ignore[typeddict-item]

    def to_dict(self) -> dict[str, Any]:
        """Secrets are stored as the names of their variables."""
        return default_to_dict(self, **self._secrets, **stored_options(self.client))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse; raises `IdentityMismatchError` if its vectors would be others."""
        options = dict(data["init_parameters"])
        secrets = {name: options.pop(name) for name in SECRETS if options.get(name)}
        deserialize_secrets_inplace(secrets, keys=secrets)
        loaded = cls(client=client_from(options, **_resolved(secrets)))
        loaded._secrets = secrets
        return loaded


@component
class KalmTextEmbedder(_Embedder):
    """Embed a query, with the query instruction."""

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, Any]:
        return {"embedding": self.client.embed_to_lists([text], role="query")[0]}

    @component.output_types(embedding=list[float])
    async def run_async(self, text: str) -> dict[str, Any]:
        return {"embedding": (await self.client.aembed_to_lists([text], role="query"))[0]}


@component
class KalmDocumentEmbedder(_Embedder):
    """Embed the contents of documents; returns copies of them that have embeddings."""

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        return _filled(documents, self.client.embed_to_lists(_texts(documents), role="document"))

    @component.output_types(documents=list[Document])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        vectors = self.client.aembed_to_lists(_texts(documents), role="document")
        return _filled(documents, await vectors)


def _resolved(secrets: dict[str, Secret]) -> dict[str, Any]:
    if literal := [name for name, secret in secrets.items() if not isinstance(secret, Secret)]:
        raise TypeError(f"{literal[0]} is not a Secret: pass Secret.from_env_var(...).")
    return {name: secret.resolve_value() for name, secret in secrets.items()}


def _texts(documents: list[Document]) -> list[str]:
    return [document.content or "" for document in documents]  # "" is refused, by its index


def _filled(documents: list[Document], vectors: list[list[float]]) -> dict[str, Any]:
    return {"documents": [replace(d, embedding=v) for d, v in zip(documents, vectors, strict=True)]}
