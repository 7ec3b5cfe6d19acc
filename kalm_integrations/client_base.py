"""The public methods that `KalmClient` and the adapters share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterable
from typing import TYPE_CHECKING, Any, Literal, Self

from kalm_integrations.config import ClientConfig
from kalm_integrations.identity import VectorIdentity
from kalm_integrations.native_threads import wait_for
from kalm_integrations.progress import Progress
from kalm_integrations.prompts import Role
from kalm_integrations.result import EmbeddedBatch, EmbeddingResult

if TYPE_CHECKING:
    from kalm_integrations.client import KalmClient

OnError = Literal["raise", "skip"]


def client_defaults() -> dict[str, Any]:
    """The default of each argument of `KalmClient`."""
    return {name: field.default for name, field in ClientConfig.model_fields.items()}


class ClientBase:
    """Has a `config` that cannot be changed. Closes its connections at the end of a block."""

    @property
    def client(self) -> KalmClient:
        """The client that embeds."""
        raise NotImplementedError

    @property
    def config(self) -> ClientConfig:
        """All arguments, validated, and what follows from them. It cannot be changed."""
        return self.client.config

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

    def embed(
        self,
        texts: Iterable[str],
        *,
        role: Role = "document",
        on_progress: Progress | None = None,
    ) -> EmbeddingResult:
        """Embed texts: vectors[i] is of texts[i].

        All texts are checked before the first is sent; identical ones are embedded once.

        Args:
            texts: Strings; see docs/bad-input.md for what can be embedded.
            role: "document" or "query": chooses the instruction and the priority.
            on_progress: Called with the number of texts that were finished since the last call.

        Returns:
            `vectors` of shape (len(texts), dimensions), float32, unit length.

        Raises:
            InvalidInputError: Texts that cannot be embedded, by index; nothing was sent, unless
                only the model's own length limit could tell.
            ConfigurationError: `role` is neither.
            DeadlineExceededError: `timeout` ran out.
            IdentityMismatchError: The vectors are of another space than expected.
            KalmError: Base class of all of them; `partial` has what was finished.
        """
        return self.client._collect(self.client._array_builder, texts, role, on_progress)

    async def aembed(
        self,
        texts: Iterable[str],
        *,
        role: Role = "document",
        on_progress: Progress | None = None,
    ) -> EmbeddingResult:
        """`embed`, without blocking the running event loop."""
        return await self.client._acollect(self.client._array_builder, texts, role, on_progress)

    def iter_embed(
        self,
        texts: Iterable[str],
        *,
        role: Role = "document",
        on_error: OnError = "raise",
    ) -> Generator[EmbeddedBatch]:
        """Embed texts as they are read; yield vectors as they come, with their indices.

        Memory stays bounded whatever the number of texts. Parts come in any order; identical
        texts are embedded once within each 8,192 texts. `timeout` is for each request.

        Args:
            texts: Strings, from a list or any iterator, which is read on the caller's thread.
                A list is checked before the first text is sent, an iterator as it is read.
            role: "document" or "query".
            on_error: "raise", or "skip": texts that cannot be embedded are reported in
                `rejected`, and all others are embedded.

        Yields:
            Parts of the answer. After a failure, everything that has finished comes first.

        Raises:
            KalmError: As `embed`; what was yielded before stays good.
        """
        return self.client._dispatcher.run(*self.client._stream(texts, role, on_error))

    def aiter_embed(
        self,
        texts: Iterable[str],
        *,
        role: Role = "document",
        on_error: OnError = "raise",
    ) -> AsyncGenerator[EmbeddedBatch]:
        """`iter_embed`, without blocking the running event loop."""
        return self.client._dispatcher.arun(*self.client._stream(texts, role, on_error))

    def count_tokens(self, texts: Iterable[str], *, role: Role = "document") -> list[int]:
        """Count the tokens of each text with the service's own tokenizer; nothing is embedded.

        Includes the instruction of `role` and the model's special tokens: what `embed` would
        compute, and what the model's length limits. Above that length, a number may be an estimate.

        Args:
            texts: Strings, of any length.
            role: "document" or "query".

        Returns:
            One number for each text.

        Raises:
            InvalidInputError: Texts that cannot be embedded, by index.
            ConfigurationError: The server is not ours, or the transport cannot count.
            KalmError: As `embed`.
        """
        return wait_for(self.client._count_tokens(texts, role))

    async def acount_tokens(self, texts: Iterable[str], *, role: Role = "document") -> list[int]:
        """`count_tokens`, without blocking the running event loop."""
        return await asyncio.wrap_future(self.client._count_tokens(texts, role))

    def warm_up(self, timeout: float | None = None) -> VectorIdentity:
        """Have the service ready before it is needed; a cold start can take minutes.

        Args:
            timeout: Seconds to wait; None is the client's `timeout`. The first start of a
                deployment may take 1,800.

        Returns:
            What the vectors will be: as the service reports it, checked against
            `expected_identity`; that alone, where it reports nothing.

        Raises:
            DeadlineExceededError: `timeout` ran out; the message says where to look.
            KalmError: The service cannot be reached, or serves other vectors.
        """
        return self.client._with_space(wait_for(self.client._ensure_ready(timeout)))

    async def awarm_up(self, timeout: float | None = None) -> VectorIdentity:
        """`warm_up`, without blocking the running event loop."""
        return self.client._with_space(
            await asyncio.wrap_future(self.client._ensure_ready(timeout))
        )

    def close(self) -> None:
        """Close the connections. A later call opens new ones."""
        wait_for(self.client._dispatcher.close())

    async def aclose(self) -> None:
        """`close`, without blocking the running event loop."""
        await asyncio.wrap_future(self.client._dispatcher.close())

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
