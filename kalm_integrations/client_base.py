"""What `KalmClient` and the adapters share: their properties, and how they are closed."""

from __future__ import annotations

from typing import Any, Self

from kalm_integrations.config import ClientConfig
from kalm_integrations.identity import VectorIdentity


def client_defaults() -> dict[str, Any]:
    """The default of each argument of `KalmClient`."""
    return {name: field.default for name, field in ClientConfig.model_fields.items()}


class ClientBase:
    """Has a `config` that cannot be changed. Closes its connections at the end of a block."""

    @property
    def config(self) -> ClientConfig:
        """All arguments, validated, and what follows from them. It cannot be changed."""
        raise NotImplementedError

    @property
    def vector_dimensions(self) -> int:
        """Dimensions of every vector; 0 for a model without profile that uses its native number."""
        return self.config.vector_dimensions

    @property
    def vector_identity(self) -> VectorIdentity:
        """What an index of these document vectors contains; see `ClientConfig`."""
        return self.config.vector_identity

    @property
    def cache_namespace(self) -> str:
        """A name that changes exactly when document vectors may; see `ClientConfig`."""
        return self.config.cache_namespace

    @property
    def query_cache_namespace(self) -> str:
        """The same for queries. Never share one cache namespace between both roles."""
        return self.config.query_cache_namespace

    def close(self) -> None:
        """Close the connections. A later call opens new ones."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """`close`, without blocking the running event loop."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        config = getattr(self, "config", None)  # absent if the constructor has raised
        return f"{type(self).__name__}({config.__repr_str__(', ') if config else ''})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.config == self.config

    def __hash__(self) -> int:
        return hash(self.config)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ClientConfig.model_fields:
            raise AttributeError(f"{name} is fixed: use with_options({name}=...)")
        super().__setattr__(name, value)
