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

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

from pydantic import ConfigDict, Field, model_validator

from kalm_integrations.client import KalmClient, Progress, progress_bar
from kalm_integrations.settings import ClientSettings

_WRONG_FRAMEWORK = (
    "this is the LlamaIndex class; LangChain takes the other one: "
    "`from kalm_integrations import KalmModalEmbeddings`, with the same arguments"
)

# The bar of the running get_text_embedding_batch, for the requests inside it.
_advance: ContextVar[Progress] = ContextVar("kalm_advance", default=lambda _: None)


class KalmModalEmbeddings(KalmClient, BaseEmbedding):
    """KaLM, or the embedded engine, as a LlamaIndex embedding model.

    Takes the arguments of `ClientSettings`, and is a `KalmClient` too: `iter_embed`, `warm_up`
    and the rest are there. LlamaIndex's own arguments work too: `model_name` must agree with
    `model`; `embed_batch_size` is how many texts LlamaIndex hands over at once (they travel in
    concurrent requests of `batch_size`), so leave it large.

    Example:
        >>> Settings.embed_model = KalmModalEmbeddings(backend="local")
    """

    model_config = ConfigDict(frozen=False, arbitrary_types_allowed=True)

    # Derived from `model`, so that a dump says it once.
    model_name: str = Field(default="", exclude=True)
    embed_batch_size: int = Field(default=2048, gt=0, le=2048)

    @model_validator(mode="after")
    def _check_model_name(self) -> KalmModalEmbeddings:
        served = self.profile.space.model
        if self.model_name not in ("", served):
            raise ValueError(
                f"model_name={self.model_name!r}: backend={self.backend!r} runs {served!r}"
            )
        self.__dict__["model_name"] = served
        return self

    @classmethod
    def class_name(cls) -> str:
        return "KalmModalEmbeddings"

    def __setattr__(self, name: str, value: Any) -> None:
        # LlamaIndex sets callback_manager and the like; ours were checked together, once.
        if name in ClientSettings.model_fields or name == "model_name":
            raise AttributeError(f"{name} is fixed: construct another KalmModalEmbeddings")
        super().__setattr__(name, value)

    def _get_query_embedding(self, query: str) -> Embedding:
        return self.embed([query], role="query").to_lists()[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return (await self.aembed([query], role="query")).to_lists()[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self.embed(texts, on_progress=_advance.get()).to_lists()

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
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
        """LlamaIndex's own, with a progress bar that moves with every request."""
        with self._bar(len(texts), show_progress):
            return super().get_text_embedding_batch(texts, show_progress=False, **kwargs)

    async def aget_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """LlamaIndex's own, with a progress bar that moves with every request."""
        with self._bar(len(texts), show_progress):
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
