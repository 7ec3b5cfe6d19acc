"""KaLM-Embedding-Gemma3-12B for LangChain, LlamaIndex and numpy.

    from kalm_integrations import KalmModalEmbeddings              # for LangChain
    from kalm_integrations.llama_index import KalmModalEmbeddings  # for LlamaIndex
    from kalm_integrations import KalmClient                       # numpy, no framework

Names load when they are first used: importing this package loads no framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kalm_integrations.client import KalmClient
    from kalm_integrations.errors import (
        ConfigurationError,
        DeadlineExceededError,
        IdentityMismatchError,
        InvalidInputError,
        KalmError,
        ServiceUnavailableError,
    )
    from kalm_integrations.identity import SpaceIdentity, VectorIdentity
    from kalm_integrations.langchain import KalmModalEmbeddings
    from kalm_integrations.options import ClientOptions
    from kalm_integrations.result import EmbeddedBatch, EmbeddingResult, PartialResult, Usage
    from kalm_integrations.transports.base import Transport
    from kalm_integrations.version import __version__

__all__ = [
    "ClientOptions",
    "ConfigurationError",
    "DeadlineExceededError",
    "EmbeddedBatch",
    "EmbeddingResult",
    "IdentityMismatchError",
    "InvalidInputError",
    "KalmClient",
    "KalmError",
    "KalmModalEmbeddings",
    "PartialResult",
    "ServiceUnavailableError",
    "SpaceIdentity",
    "Transport",
    "Usage",
    "VectorIdentity",
    "__version__",
]

_OTHER_MODULES = {
    "ClientOptions": "options",
    "EmbeddedBatch": "result",
    "EmbeddingResult": "result",
    "KalmClient": "client",
    "KalmModalEmbeddings": "langchain",
    "PartialResult": "result",
    "SpaceIdentity": "identity",
    "Transport": "transports.base",
    "Usage": "result",
    "VectorIdentity": "identity",
    "__version__": "version",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_OTHER_MODULES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
