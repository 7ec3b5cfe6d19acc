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
    from kalm_integrations.client import KalmClient as KalmClient
    from kalm_integrations.errors import ConfigurationError as ConfigurationError
    from kalm_integrations.errors import DeadlineExceededError as DeadlineExceededError
    from kalm_integrations.errors import IdentityMismatchError as IdentityMismatchError
    from kalm_integrations.errors import InvalidInputError as InvalidInputError
    from kalm_integrations.errors import KalmError as KalmError
    from kalm_integrations.errors import ServiceUnavailableError as ServiceUnavailableError
    from kalm_integrations.identity import SpaceIdentity as SpaceIdentity
    from kalm_integrations.identity import VectorIdentity as VectorIdentity
    from kalm_integrations.langchain import KalmModalEmbeddings as KalmModalEmbeddings
    from kalm_integrations.result import EmbeddedBatch as EmbeddedBatch
    from kalm_integrations.result import EmbeddingResult as EmbeddingResult
    from kalm_integrations.result import PartialResult as PartialResult
    from kalm_integrations.result import Usage as Usage
    from kalm_integrations.version import __version__ as __version__

_HOMES = {
    "__version__": "version",
    "KalmClient": "client",
    "ConfigurationError": "errors",
    "DeadlineExceededError": "errors",
    "IdentityMismatchError": "errors",
    "InvalidInputError": "errors",
    "KalmError": "errors",
    "ServiceUnavailableError": "errors",
    "SpaceIdentity": "identity",
    "VectorIdentity": "identity",
    "KalmModalEmbeddings": "langchain",
    "EmbeddedBatch": "result",
    "EmbeddingResult": "result",
    "PartialResult": "result",
    "Usage": "result",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
