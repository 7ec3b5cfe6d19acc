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

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NoReturn, Self

from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation import (  # type: ignore[attr-defined]
    Dispatcher,
    get_dispatcher,
)
from llama_index.core.instrumentation.event_handlers import NullEventHandler
from llama_index.core.instrumentation.events.embedding import (
    EmbeddingEndEvent,
    EmbeddingStartEvent,
)
from llama_index.core.storage.kvstore.types import BaseKVStore
from pydantic import ConfigDict, Field, model_validator

from kalm_integrations import validation
from kalm_integrations.client import KalmClient, Progress, progress_bar
from kalm_integrations.errors import IdentityMismatchError
from kalm_integrations.llama_index.batching import batch, batches_of, join_call
from kalm_integrations.llama_index.cache import RoleCache, looking_up
from kalm_integrations.options import ClientConfig
from kalm_integrations.prompts import Role

dispatcher = get_dispatcher(__name__)

_WRONG_FRAMEWORK = (
    "this is the LlamaIndex class; LangChain takes the other one: "
    "`from kalm_integrations import KalmModalEmbeddings`, with the same arguments"
)

# Of what a dump tells, the part that decides the vectors, and where they come from. All else only
# tunes, and IngestionPipeline, whose cache is keyed by the dump, would embed again for it.
_DUMPED: Final = frozenset(
    {
        "class_name",
        "backend",
        "base_url",
        "app_name",
        "modal_class",
        "environment_name",
        "model",
        "dimensions",
        "query_instruction",
        "document_instruction",
        "truncate",
        "expected_identity",
    }
)


class KalmModalEmbeddings(KalmClient, BaseEmbedding):
    """KaLM, or the embedded engine, as a LlamaIndex embedding model.

    Takes the arguments of `ClientConfig`, and is a `KalmClient` too: `iter_embed`, `warm_up`
    and the rest are there. LlamaIndex's own arguments work too: `model_name` must agree with
    `model`; an `embeddings_cache` keeps queries, documents and models apart; `embed_batch_size` is
    how many texts are looked up in it at once, or counted by a `rate_limiter`. Without either, all
    texts of a call are under way together, in requests of `batch_size`.

    `to_dict` and `to_json` hold what decides the vectors, and where they come from. Tuning and
    secrets are not in them: pass those to `from_dict`, or leave them to the environment. Pickles
    and copies hold the tuning too.

    Example:
        >>> Settings.embed_model = KalmModalEmbeddings(backend="local")
    """

    model_config = ConfigDict(frozen=False, arbitrary_types_allowed=True)

    # Derived from `model`, so that a dump says it once.
    model_name: str = Field(default="", exclude=True)
    embed_batch_size: int = Field(default=2048, gt=0, le=2048)
    embeddings_cache: Any = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _settle(self) -> KalmModalEmbeddings:
        served = self.profile.space.model
        if self.model_name not in ("", served):
            raise ValueError(
                f"model_name={self.model_name!r}: the model is {served!r}; leave model_name out, "
                "and name another model with model= or KALM_MODEL"
            )
        self.__dict__["model_name"] = served
        self.embeddings_cache = self.embeddings_cache  # in collections of our own
        return self

    @classmethod
    def class_name(cls) -> str:
        return "KalmModalEmbeddings"

    def __setattr__(self, name: str, value: Any) -> None:
        # LlamaIndex sets callback_manager and the like; ours were checked together, once.
        if name in ClientConfig.model_fields or name == "model_name":
            raise AttributeError(f"{name} is fixed: construct another KalmModalEmbeddings")
        if name == "embeddings_cache" and isinstance(value, BaseKVStore):
            store = value.store if isinstance(value, RoleCache) else value
            roles: dict[Role, str] = {
                "document": self.cache_namespace,
                "query": self.query_cache_namespace,
            }
            value = RoleCache(store, roles)
        BaseEmbedding.__setattr__(self, name, value)

    def _copied(self) -> Iterable[str]:
        return type(self).model_fields.keys() - {"model_name"}  # follows from the others

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """What decides the vectors, and where they come from; see the class."""
        dumped = super().to_dict(**kwargs)
        kept = {name: value for name, value in dumped.items() if name in _DUMPED}
        # Two ways to say one thing are one dump.
        said = {"model": self.served_model, "dimensions": self.vector_dimensions or None}
        if self.resolved_backend != "http":
            said["base_url"] = None
        if self.expected_identity == self.profile.space:
            said["expected_identity"] = None
        return kept | said | {"cache_namespace": self.cache_namespace}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], **kwargs: Any) -> Self:
        """The inverse of `to_dict`; `kwargs` are further arguments, or others than dumped.

        Raises:
            IdentityMismatchError: Vectors would be others than those of the dumped object,
                because this release, or the environment, stands for another space.
        """
        arguments = dict(data)
        dumped = arguments.pop("cache_namespace", None)
        made = super().from_dict(arguments, **kwargs)
        if dumped not in (None, made.cache_namespace) and not kwargs.keys() & _DUMPED:
            raise IdentityMismatchError(
                f"dumped with document vectors {dumped}; here they would be {made.cache_namespace}."
            )
        return made

    @dispatcher.span
    def get_query_embedding(self, query: str) -> Embedding:
        """LlamaIndex's own, with a cache of its own."""
        if self._by_llama_index:
            with looking_up("query"):
                return super().get_query_embedding(query)
        with self._observed([query]) as seen:
            seen([embedding := self._embed_to_lists([query], "query")[0]])
        return embedding

    @dispatcher.span
    async def aget_query_embedding(self, query: str) -> Embedding:
        """LlamaIndex's own, with a cache of its own."""
        if self._by_llama_index:
            with looking_up("query"):
                return await super().aget_query_embedding(query)
        with self._observed([query]) as seen:
            seen([embedding := (await self._aembed_to_lists([query], "query"))[0]])
        return embedding

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._embed_to_lists([query], "query")[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return (await self._aembed_to_lists([query], "query"))[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        with batch(texts) as advance:
            return self._embed_to_lists(texts, "document", advance)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        join_call()
        with batch(texts) as advance:
            return await self._aembed_to_lists(texts, "document", advance)

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
        texts = validation.check_texts(validation.check_collection(texts), self.truncate)
        with self._bar(len(texts), show_progress) as advance:
            if self._by_llama_index:
                with batches_of(texts, advance):
                    return super().get_text_embedding_batch(texts, **kwargs)
            with self._observed(texts) as seen:
                seen(embeddings := self._embed_to_lists(texts, "document", advance))
            return embeddings

    @dispatcher.span
    async def aget_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """LlamaIndex's own, with all texts checked first and a bar that moves with requests."""
        texts = validation.check_texts(validation.check_collection(texts), self.truncate)
        with self._bar(len(texts), show_progress) as advance:
            if self._by_llama_index:
                with batches_of(texts, advance):
                    return await super().aget_text_embedding_batch(texts, **kwargs)
            with self._observed(texts) as seen:
                seen(embeddings := await self._aembed_to_lists(texts, "document", advance))
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
        if not (show_progress or self.show_progress):
            yield None
            return
        with progress_bar(total) as advance:
            yield advance


def _is_heard(where: Dispatcher) -> bool:
    """Whether an event that is dispatched here reaches anybody: making one takes longer than all
    else that LlamaIndex does for a query."""
    while all(type(handler) is NullEventHandler for handler in where.event_handlers):
        if not where.propagate:
            return False
        where = where.parent
    return True
