"""The arguments of LlamaIndex's class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypedDict, cast

from llama_index.core.callbacks import CallbackManager
from llama_index.core.storage.kvstore.types import BaseKVStore

from kalm_integrations.config import ClientConfig
from kalm_integrations.environment import unknown_argument
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.options import ClientOptions, clear_arguments

if TYPE_CHECKING:
    from llama_index.core.rate_limiter import BaseRateLimiter
else:  # older versions of llama-index-core lack it
    BaseRateLimiter = Any


class OwnOptions(TypedDict, total=False):
    """LlamaIndex's own arguments."""

    model_name: str
    """Must agree with `model`; leave it out. Default: ""."""

    embed_batch_size: int
    """Number of texts that LlamaIndex looks up in its cache at once, or that its rate limiter
    counts as one call, 1 to 2048. Requests hold `batch_size` texts. Default: 2048."""

    embeddings_cache: BaseKVStore | None
    """Store of vectors; it keeps queries, documents and models apart. Default: None."""

    callback_manager: CallbackManager
    """LlamaIndex's callbacks. Default: one without handlers."""

    num_workers: int | None
    """Number of batches under way at a time in LlamaIndex's async calls. Default: None."""

    rate_limiter: BaseRateLimiter | None
    """Called before each batch of `embed_batch_size` texts. Default: None."""


class LlamaIndexOptions(ClientOptions, OwnOptions, total=False):
    """Arguments of `KalmClient`, and LlamaIndex's own."""


OWN: Final = OwnOptions.__annotations__.keys()


def split(options: LlamaIndexOptions) -> tuple[dict[str, Any], ClientOptions]:
    """LlamaIndex's arguments, and those of the client; `options` is empty afterwards.

    Raises:
        ConfigurationError: An argument is unknown.
    """
    own = {name: value for name, value in options.items() if name in OWN}
    others = {name: value for name, value in options.items() if name not in OWN}
    clear_arguments(options)
    if unknown := others.keys() - ClientConfig.model_fields:
        clear_arguments(others)
        raise ConfigurationError(
            unknown_argument(min(unknown), (*ClientConfig.model_fields, *sorted(OWN)))
        )
    return own, cast(ClientOptions, others)
