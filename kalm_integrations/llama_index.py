"""`KalmModalEmbeddings` for LlamaIndex."""

from __future__ import annotations

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
except ImportError as error:
    from kalm_integrations.extras import install_command

    raise ImportError(
        "kalm_integrations.llama_index needs llama-index-core: "
        f"{install_command('llama-index')}. For LangChain use "
        "`from kalm_integrations import KalmModalEmbeddings`; without a framework, "
        "`from kalm_integrations import KalmClient`."
    ) from error

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NoReturn, Self

from llama_index.core.storage.kvstore.types import BaseKVStore
from pydantic import ConfigDict, Field, model_validator

from kalm_integrations import inputs
from kalm_integrations.client import KalmClient, Progress, progress_bar
from kalm_integrations.errors import IdentityMismatchError, InvalidInputError, InvalidText
from kalm_integrations.llama_index_cache import RoleCache, looking_up
from kalm_integrations.prompts import Role
from kalm_integrations.settings import ClientSettings

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


class _Batches:
    """The tasks in which LlamaIndex runs the batches of one call."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any] | None] = set()
        self._over = False

    def join(self) -> None:
        """Count the running task among them."""
        if self._over:
            raise asyncio.CancelledError
        self._tasks.add(asyncio.current_task())

    def end(self) -> None:
        """Cancel those that still run, or have yet to."""
        self._over = True
        for task in self._tasks - {None, asyncio.current_task()}:
            task.cancel()  # type: ignore[union-attr]


# Of the running get_text_embedding_batch, for the requests inside it.
_advance: ContextVar[Progress] = ContextVar("kalm_advance", default=lambda _: None)
_whole: ContextVar[list[str] | None] = ContextVar("kalm_whole", default=None)
_batches: ContextVar[_Batches | None] = ContextVar("kalm_batches", default=None)


class KalmModalEmbeddings(KalmClient, BaseEmbedding):
    """KaLM, or the embedded engine, as a LlamaIndex embedding model.

    Takes the arguments of `ClientSettings`, and is a `KalmClient` too: `iter_embed`, `warm_up`
    and the rest are there. LlamaIndex's own arguments work too: `model_name` must agree with
    `model`; `embed_batch_size` is how many texts LlamaIndex hands over at once (they travel in
    concurrent requests of `batch_size`), so leave it large. An `embeddings_cache` keeps queries,
    documents and models apart.

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
                f"model_name={self.model_name!r}: backend={self.backend!r} runs {served!r}"
            )
        self.__dict__["model_name"] = served
        self.embeddings_cache = self.embeddings_cache  # in collections of our own
        return self

    @classmethod
    def class_name(cls) -> str:
        return "KalmModalEmbeddings"

    def __setattr__(self, name: str, value: Any) -> None:
        # LlamaIndex sets callback_manager and the like; ours were checked together, once.
        if name in ClientSettings.model_fields or name == "model_name":
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

    def get_query_embedding(self, query: str) -> Embedding:
        """LlamaIndex's own, with a cache of its own."""
        with looking_up("query"):
            return super().get_query_embedding(query)

    async def aget_query_embedding(self, query: str) -> Embedding:
        """LlamaIndex's own, with a cache of its own."""
        with looking_up("query"):
            return await super().aget_query_embedding(query)

    def _get_query_embedding(self, query: str) -> Embedding:
        return self.embed([query], role="query").to_lists()[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return (await self.aembed([query], role="query")).to_lists()[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        with _located(texts):
            return self.embed(texts, on_progress=_advance.get()).to_lists()

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        if (batches := _batches.get()) is not None:
            batches.join()
        with _located(texts):
            return (await self.aembed(texts, on_progress=_advance.get())).to_lists()

    def embed_documents(self, texts: list[str]) -> NoReturn:
        """LangChain's method: says which class LangChain takes."""
        raise TypeError(_WRONG_FRAMEWORK)

    def embed_query(self, text: str) -> NoReturn:
        """LangChain's method: says which class LangChain takes."""
        raise TypeError(_WRONG_FRAMEWORK)

    def get_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """LlamaIndex's own, with all texts checked first and a bar that moves with requests."""
        texts = inputs.check(inputs.iterate(texts), self.truncate)
        with _whole_list(texts), self._bar(len(texts), show_progress):
            return super().get_text_embedding_batch(texts, show_progress=False, **kwargs)

    async def aget_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """LlamaIndex's own, with all texts checked first and a bar that moves with requests."""
        texts = inputs.check(inputs.iterate(texts), self.truncate)
        with (
            _whole_list(texts),
            _failing_together(),
            self._bar(len(texts), show_progress),
        ):
            return await super().aget_text_embedding_batch(texts, show_progress=False, **kwargs)

    @contextmanager
    def _bar(self, total: int, show_progress: bool) -> Iterator[None]:
        if not (show_progress or self.show_progress):
            yield
            return
        with progress_bar(total) as advance:
            token = _advance.set(advance)
            try:
                yield
            finally:
                _advance.reset(token)


@contextmanager
def _whole_list(texts: list[str]) -> Iterator[None]:
    """Inside, texts are a part of these."""
    token = _whole.set(texts)
    try:
        yield
    finally:
        _whole.reset(token)


@contextmanager
def _located(part: list[str]) -> Iterator[None]:
    """Name a bad text by its places in the caller's list, not in the part that LlamaIndex took."""
    try:
        yield
    except InvalidInputError as error:
        whole, bad = _whole.get(), {part[bad.index]: bad.reason for bad in error.invalid}
        if whole is None or not bad:
            raise
        invalid = [InvalidText(i, bad[text]) for i, text in enumerate(whole) if text in bad]
        raise type(error).of(invalid) from error


@contextmanager
def _failing_together() -> Iterator[None]:
    """When one batch fails, end the others: LlamaIndex lets them run on, unseen and paid for."""
    batches = _Batches()
    token = _batches.set(batches)
    try:
        yield
    finally:
        _batches.reset(token)
        batches.end()
