"""`KalmModalEmbeddings` for LlamaIndex."""

from __future__ import annotations

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
except ImportError as error:
    from kalm_integrations.install_hints import install_command

    raise ImportError(
        "kalm_integrations.llama_index needs llama-index-core: "
        f"{install_command('llama-index')}. For LangChain use "
        "`from kalm_integrations import KalmModalEmbeddings`; without a framework, "
        "`from kalm_integrations import KalmClient`."
    ) from error

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Final,
    Never,
    NoReturn,
    Self,
    TypedDict,
    Unpack,
    cast,
)

from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.embedding import (
    EmbeddingEndEvent,
    EmbeddingStartEvent,
)
from llama_index.core.storage.kvstore.types import BaseKVStore
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.dispatcher import Dispatcher
from llama_index_instrumentation.event_handlers import NullEventHandler
from pydantic import ConfigDict, Field, PrivateAttr, ValidationError

from kalm_integrations import client as clients
from kalm_integrations import validation
from kalm_integrations.adapter import ClientAdapter, SharedClient, client_of
from kalm_integrations.client import KalmClient, Progress, progress_bar
from kalm_integrations.environment import explain, unknown_argument
from kalm_integrations.errors import ConfigurationError, IdentityMismatchError
from kalm_integrations.llama_index.batching import batch, batches_of, join_call
from kalm_integrations.llama_index.cache import RoleCache, looking_up
from kalm_integrations.options import ClientConfig, ClientOptions, forget
from kalm_integrations.prompts import Role
from kalm_integrations.signatures import documented, refuse_positional

if TYPE_CHECKING:
    from llama_index.core.rate_limiter import BaseRateLimiter
else:  # older versions of llama-index-core lack it
    BaseRateLimiter = Any

dispatcher = get_dispatcher(__name__)

_WRONG_FRAMEWORK = (
    "this is the LlamaIndex class; LangChain takes the other one: "
    "`from kalm_integrations import KalmModalEmbeddings`, with the same arguments"
)

# What decides the vectors, and where they come from. All else only tunes, and IngestionPipeline,
# whose cache is keyed by the dump, would embed again for it.
_DUMPED: Final = frozenset(
    {
        "backend",
        "base_url",
        "app_name",
        "class_name",
        "environment_name",
        "model",
        "dimensions",
        "query_instruction",
        "document_instruction",
        "truncate",
        "expected_identity",
    }
)


class _OwnOptions(TypedDict, total=False):
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


class LlamaIndexOptions(ClientOptions, _OwnOptions, total=False):
    """Arguments of `KalmClient`, and LlamaIndex's own."""


_LLAMA_INDEX: Final = _OwnOptions.__annotations__.keys()


def _defaults() -> dict[str, Any]:
    fields = KalmModalEmbeddings.model_fields
    return clients.defaults() | {
        name: fields[name].get_default(call_default_factory=True) for name in _LLAMA_INDEX
    }


@documented(SharedClient, ClientOptions, _OwnOptions, defaults=_defaults)
class KalmModalEmbeddings(ClientAdapter, BaseEmbedding):
    """KaLM, or the embedded engine, as a LlamaIndex embedding model.

    Takes the arguments of `KalmClient`, or `client=`, a `KalmClient` to share; and LlamaIndex's
    own. Without a cache and a rate limiter, all texts of a call are under way together.

    `to_dict` and `to_json` hold what decides the vectors, and where they come from. Tuning and
    secrets are not in them: pass those to `from_dict`, or leave them to the environment. Pickles
    and copies hold the tuning too.

    Example:
        >>> Settings.embed_model = KalmModalEmbeddings(backend="local")
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    # Derived from `model`, so that a dump names it once.
    model_name: Annotated[str, Field(exclude=True)] = ""
    embed_batch_size: Annotated[int, Field(gt=0, le=2048)] = 2048
    embeddings_cache: Annotated[Any, Field(exclude=True)] = None
    _client: KalmClient = PrivateAttr()

    def __init__(
        self,
        *positional: Never,
        client: KalmClient | None = None,
        **options: Unpack[LlamaIndexOptions],
    ) -> None:
        refuse_positional(type(self), positional)
        own, others = _split(options)
        client = client_of(client, others)
        model, name = client.served_model, own.pop("model_name", "")
        if name not in ("", model):
            raise ConfigurationError(
                f"model_name={name!r}: the model is {model!r}; leave model_name out, and name "
                "another model with model= or KALM_MODEL."
            )
        try:
            super().__init__(model_name=model, **own)
        except ValidationError as error:
            raise ConfigurationError(explain(error, {})) from None
        self._client = client
        self.embeddings_cache = self.embeddings_cache  # in collections of our own

    @classmethod
    def class_name(cls) -> str:
        return "KalmModalEmbeddings"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model_name":
            raise AttributeError("model_name is fixed: use with_options(model=...)")
        if name == "embeddings_cache" and isinstance(value, BaseKVStore):
            store = value.store if isinstance(value, RoleCache) else value
            roles: dict[Role, str] = {
                "document": self.cache_namespace,
                "query": self.query_cache_namespace,
            }
            value = RoleCache(store, roles)
        super().__setattr__(name, value)

    def with_options(self, **options: Unpack[LlamaIndexOptions]) -> Self:
        """Return an embedding model with some arguments changed, and connections of its own."""
        own, others = _split(options)
        kept = {name: getattr(self, name) for name in _LLAMA_INDEX - {"model_name"}}
        return type(self)(client=self._client.with_options(**others), **{**kept, **own})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy; with `update`, `with_options`."""
        return self.with_options(**update) if update else super().model_copy(deep=deep)

    def __hash__(self) -> int:
        return hash(self._client)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Arguments that differ from their defaults."""
        private = getattr(self, "__pydantic_private__", None)  # absent if the constructor failed
        if private and "_client" in private:
            yield from private["_client"].config.__repr_args__()
            for name in sorted(_LLAMA_INDEX - {"model_name", "callback_manager"}):
                value = getattr(self, name, None)
                if value != type(self).model_fields[name].default:
                    yield name, value

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # leaves out what cannot be pickled
        private = state["__pydantic_private__"]
        private.setdefault("_client", self._client.with_options(on_usage=None))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(client=state["__pydantic_private__"]["_client"], **state["__dict__"])  # type: ignore[misc]

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Return what decides the vectors, and where they come from; see the class."""
        config = self._client.config
        dumped = config.model_dump(**{"include": _DUMPED, **kwargs})
        # Two ways to say one thing are one dump.
        dumped |= {"model": config.served_model, "dimensions": config.vector_dimensions or None}
        dumped |= {name: ClientConfig.model_fields[name].default for name in config.unused()}
        if config.expected_identity == config.profile.space:
            dumped["expected_identity"] = None
        if config.transport is not None:
            dumped["transport"] = type(config.transport).__qualname__  # to be passed to from_dict
        dumped["modal_class"] = dumped.pop("class_name")
        return dumped | {"class_name": self.class_name(), "cache_namespace": self.cache_namespace}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], **kwargs: Any) -> Self:
        """The inverse of `to_dict`; `kwargs` are further arguments, or others than dumped.

        Raises:
            IdentityMismatchError: Vectors would differ from those of the dumped object, because
                this release, or the environment, stands for another space.
        """
        arguments = {name: value for name, value in data.items() if name != "class_name"}
        dumped = arguments.pop("cache_namespace", None)
        if "modal_class" in arguments:
            arguments["class_name"] = arguments.pop("modal_class")
        loaded = cls(**{**arguments, **kwargs})
        if dumped not in (None, loaded.cache_namespace) and not kwargs.keys() & _DUMPED:
            raise IdentityMismatchError(
                f"dumped with document vectors {dumped}; here they would be "
                f"{loaded.cache_namespace}."
            )
        return loaded

    @dispatcher.span
    def get_query_embedding(self, query: str) -> Embedding:
        """LlamaIndex's own, with a cache of its own."""
        if self._by_llama_index:
            with looking_up("query"):
                return super().get_query_embedding(query)
        with self._observed([query]) as seen:
            seen([embedding := self._client.embed_to_lists([query], "query")[0]])
        return embedding

    @dispatcher.span
    async def aget_query_embedding(self, query: str) -> Embedding:
        """LlamaIndex's own, with a cache of its own."""
        if self._by_llama_index:
            with looking_up("query"):
                return await super().aget_query_embedding(query)
        with self._observed([query]) as seen:
            seen([embedding := (await self._client.aembed_to_lists([query], "query"))[0]])
        return embedding

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._client.embed_to_lists([query], "query")[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return (await self._client.aembed_to_lists([query], "query"))[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        with batch(texts) as advance:
            return self._client.embed_to_lists(texts, "document", advance)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        join_call()
        with batch(texts) as advance:
            return await self._client.aembed_to_lists(texts, "document", advance)

    def embed_documents(self, texts: list[str]) -> NoReturn:
        """LangChain's method: says which class LangChain takes."""
        raise TypeError(_WRONG_FRAMEWORK)

    def embed_query(self, text: str) -> NoReturn:
        """LangChain's method: says which class LangChain takes."""
        raise TypeError(_WRONG_FRAMEWORK)

    @dispatcher.span
    def get_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """LlamaIndex's own, with all texts checked first and a bar that moves with requests."""
        texts = validation.check_texts(texts, self._client.config.truncate)
        with self._bar(len(texts), show_progress) as advance:
            if self._by_llama_index:
                with batches_of(texts, advance):
                    return super().get_text_embedding_batch(texts, **kwargs)
            with self._observed(texts) as seen:
                seen(embeddings := self._client.embed_to_lists(texts, "document", advance))
            return embeddings

    @dispatcher.span
    async def aget_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """LlamaIndex's own, with all texts checked first and a bar that moves with requests."""
        texts = validation.check_texts(texts, self._client.config.truncate)
        with self._bar(len(texts), show_progress) as advance:
            if self._by_llama_index:
                with batches_of(texts, advance):
                    return await super().aget_text_embedding_batch(texts, **kwargs)
            with self._observed(texts) as seen:
                seen(embeddings := await self._client.aembed_to_lists(texts, "document", advance))
            return embeddings

    @property
    def _by_llama_index(self) -> bool:
        """Whether LlamaIndex's own way is needed, for its cache and its rate limiter: it waits for
        each `embed_batch_size` texts, and its events copy every vector to validate it."""
        return self.embeddings_cache is not None or getattr(self, "rate_limiter", None) is not None

    @contextmanager
    def _observed(self, texts: list[str]) -> Iterator[Callable[[list[Embedding]], None]]:
        """What LlamaIndex tells whoever observes a batch; the block says its result."""
        if not (self.callback_manager.handlers or _is_heard(dispatcher)):
            yield lambda _: None
            return
        described = {
            "class_name": self.class_name(),
            "model_name": self.model_name,
            "embed_batch_size": self.embed_batch_size,
        }
        dispatcher.event(EmbeddingStartEvent(model_dict=described))
        with self.callback_manager.event(
            CBEventType.EMBEDDING, payload={EventPayload.SERIALIZED: described}
        ) as event:
            result: list[Embedding] = []
            yield result.extend
            event.on_end({EventPayload.CHUNKS: texts, EventPayload.EMBEDDINGS: result})
        ended = EmbeddingEndEvent(chunks=[], embeddings=[])
        # A copy takes them as they are; validated, every vector would be copied.
        dispatcher.event(ended.model_copy(update={"chunks": texts, "embeddings": result}))

    @contextmanager
    def _bar(self, total: int, show_progress: bool) -> Iterator[Progress | None]:
        if not (show_progress or self._client.config.show_progress):
            yield None
            return
        with progress_bar(total) as advance:
            yield advance


def _split(options: LlamaIndexOptions) -> tuple[dict[str, Any], ClientOptions]:
    """LlamaIndex's arguments and ours."""
    own = {name: value for name, value in options.items() if name in _LLAMA_INDEX}
    ours = {name: value for name, value in options.items() if name not in _LLAMA_INDEX}
    forget(options)
    if unknown := ours.keys() - ClientConfig.model_fields.keys():
        forget(ours)
        raise ConfigurationError(
            unknown_argument(min(unknown), (*ClientConfig.model_fields, *sorted(_LLAMA_INDEX)))
        )
    return own, cast(ClientOptions, ours)


def _is_heard(where: Dispatcher) -> bool:
    """Whether an event that is dispatched here reaches anybody: making one takes longer than all
    else that LlamaIndex does for a query."""
    while all(type(handler) is NullEventHandler for handler in where.event_handlers):
        if not where.propagate:
            return False
        where = where.parent
    return True
