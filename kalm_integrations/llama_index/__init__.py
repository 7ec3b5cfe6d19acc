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

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, Never, NoReturn, Self, Unpack

from llama_index.core.storage.kvstore.types import BaseKVStore
from llama_index_instrumentation import get_dispatcher
from pydantic import ConfigDict, Field, PrivateAttr, ValidationError

from kalm_integrations import validation
from kalm_integrations.adapter import (
    STORED,
    ClientAdapter,
    SharedClient,
    adapter_defaults,
    client_of,
)
from kalm_integrations.client import KalmClient
from kalm_integrations.config import ClientConfig
from kalm_integrations.environment import explain
from kalm_integrations.errors import ConfigurationError, IdentityMismatchError
from kalm_integrations.identity import fingerprint
from kalm_integrations.llama_index.batching import batch, batches_of
from kalm_integrations.llama_index.cache import RoleCache, looking_up
from kalm_integrations.llama_index.events import observed
from kalm_integrations.llama_index.hooks import complete_hooks, overrides_hooks
from kalm_integrations.llama_index.options import OWN, LlamaIndexOptions, OwnOptions, split
from kalm_integrations.options import ClientOptions, clear_arguments
from kalm_integrations.progress import progress_bar
from kalm_integrations.signatures import documented, refuse_positional

dispatcher = get_dispatcher(__name__)


def _defaults() -> dict[str, Any]:
    fields = KalmModalEmbeddings.model_fields
    return adapter_defaults() | {
        name: fields[name].get_default(call_default_factory=True) for name in OWN
    }


@documented(SharedClient, ClientOptions, OwnOptions, defaults=_defaults)
class KalmModalEmbeddings(ClientAdapter, BaseEmbedding):
    """KaLM, or the embedded engine, as a LlamaIndex embedding model.

    Takes the arguments of `KalmClient`, or `client=`, a `KalmClient` to share; and LlamaIndex's
    own. Without a cache and a rate limiter, all texts of a call are under way together.

    `to_dict` and `to_json` hold what decides the vectors, and where they come from. Tuning and
    secrets are not in them: pass those to `from_dict`, or leave them to the environment. Pickles
    and copies hold the tuning too.

    Examples:
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
        own, others = split(options)
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
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        complete_hooks(cls, KalmModalEmbeddings)

    @classmethod
    def class_name(cls) -> str:
        return "KalmModalEmbeddings"

    @property
    def cache_namespace(self) -> str:
        """As `KalmClient.cache_namespace`; another one for each subclass that overrides hooks."""
        return super().cache_namespace + self._suffix

    @property
    def query_cache_namespace(self) -> str:
        return super().query_cache_namespace + self._suffix

    @property
    def _suffix(self) -> str:
        name = {"class": f"{type(self).__module__}.{type(self).__qualname__}"}
        return f"-{fingerprint(name)}" if self._has_hooks else ""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model_name":
            raise AttributeError("model_name is fixed: use with_options(model=...)")
        if name == "embeddings_cache" and isinstance(value, BaseKVStore):
            store = value.store if isinstance(value, RoleCache) else value
            names = self.cache_namespace, self.query_cache_namespace
            value = RoleCache(store, {"document": names[0], "query": names[1]})
        super().__setattr__(name, value)

    def with_options(self, **options: Unpack[LlamaIndexOptions]) -> Self:
        """Return an embedding model with some arguments changed, and connections of its own."""
        own, others = split(options)
        kept = {name: getattr(self, name) for name in OWN - {"model_name"}}
        try:
            return type(self)(client=self._client.with_options(**others), **{**kept, **own})
        finally:
            clear_arguments(others)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy; with `update`, `with_options`."""
        return self.with_options(**update) if update else super().model_copy(deep=deep)

    __eq__ = BaseEmbedding.__eq__
    __hash__ = ClientAdapter.__hash__
    __repr__ = BaseEmbedding.__repr__

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Arguments that differ from their defaults."""
        private = getattr(self, "__pydantic_private__", None)  # absent if the constructor failed
        if private and "_client" in private:
            yield from private["_client"].config.__repr_args__()
            for name in sorted(OWN - {"model_name", "callback_manager"}):
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
        dumped = config.model_dump(**{"include": STORED, **kwargs})
        # Two ways to say one thing are one dump.
        dumped |= {"model": config.served_model, "dimensions": config.vector_dimensions or None}
        for name, value in config.__dict__.items():  # what has no effect beside it is not dumped
            for other in config.contradicted_by(name, value):
                dumped[other] = ClientConfig.model_fields[other].default
        if config.expected_identity == config.model_profile.space:
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
        if dumped not in (None, loaded.cache_namespace) and not kwargs.keys() & STORED:
            raise IdentityMismatchError(
                f"dumped with document vectors {dumped}; here they would be "
                f"{loaded.cache_namespace}."
            )
        return loaded

    def get_query_embedding(self, query: str) -> Embedding:
        """LlamaIndex's own, with a cache of its own."""
        if self._by_llama_index:
            with looking_up("query"):
                return super().get_query_embedding(query)
        with observed(self, dispatcher, [query]) as report:
            report([embedding := self._client.embed_to_lists([query], role="query")[0]])
        return embedding

    async def aget_query_embedding(self, query: str) -> Embedding:
        """LlamaIndex's own, with a cache of its own."""
        if self._by_llama_index:
            with looking_up("query"):
                return await super().aget_query_embedding(query)
        with observed(self, dispatcher, [query]) as report:
            report([embedding := (await self._client.aembed_to_lists([query], role="query"))[0]])
        return embedding

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._client.embed_to_lists([query], role="query")[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return (await self._client.aembed_to_lists([query], role="query"))[0]

    # None of these calls another one: a subclass may override both.

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._client.embed_to_lists([text], role="document")[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._client.aembed_to_lists([text], role="document"))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        with batch(texts) as callbacks:
            return self._client.embed_to_lists(texts, role="document", **callbacks)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        with batch(texts) as callbacks:
            return await self._client.aembed_to_lists(texts, role="document", **callbacks)

    def embed_documents(self, *texts: Any, **_: Any) -> NoReturn:
        """LangChain's method: says which class LangChain takes."""
        raise TypeError(
            "this is the LlamaIndex class; LangChain takes the other one: "
            "`from kalm_integrations import KalmModalEmbeddings`, with the same arguments"
        )

    embed_query = embed_documents

    def get_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """LlamaIndex's own, with all texts checked first and a bar that moves with requests."""
        with self._call(texts, show_progress) as checked:
            if self._by_llama_index:
                return super().get_text_embedding_batch(checked, **kwargs)
            with observed(self, dispatcher, checked) as report:
                report(embeddings := self._get_text_embeddings(checked))
            return embeddings

    async def aget_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """LlamaIndex's own, with all texts checked first and a bar that moves with requests."""
        with self._call(texts, show_progress) as checked:
            if self._by_llama_index:
                return await super().aget_text_embedding_batch(checked, **kwargs)
            with observed(self, dispatcher, checked) as report:
                report(embeddings := await self._aget_text_embeddings(checked))
            return embeddings

    @contextmanager
    def _call(self, texts: list[str], show_progress: bool) -> Iterator[list[str]]:
        """One call, whose batches share a progress bar; yields its texts, checked."""
        show = show_progress or self._client.config.show_progress
        bar = progress_bar(len(texts)) if show else nullcontext(None)
        if not self._has_hooks:  # which may replace texts that cannot be embedded
            texts = validation.check_texts(texts, self._client.config.truncate)
        with bar as advance, batches_of(texts, advance):
            yield texts

    @property
    def _has_hooks(self) -> bool:
        """Whether a subclass changes texts or vectors."""
        return overrides_hooks(type(self), KalmModalEmbeddings)

    @property
    def _by_llama_index(self) -> bool:
        """Whether LlamaIndex's own way is needed, for its cache, its rate limiter, or batches of
        `embed_batch_size` texts for a subclass: it waits for each batch, and its events copy every
        vector to validate it."""
        limiter = getattr(self, "rate_limiter", None)
        return self.embeddings_cache is not None or limiter is not None or self._has_hooks
