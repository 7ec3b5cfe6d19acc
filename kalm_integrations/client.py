"""`KalmClient`: texts in, numpy vectors out, from any thread or event loop.

The adapters hold one. The sync and async methods differ only in how they wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, aclosing
from dataclasses import replace
from typing import Any, Literal, Never, Self, TypeVar, Unpack, get_args

from kalm_integrations import validation
from kalm_integrations.batching import Batch, numbered_blocks, plan
from kalm_integrations.client_base import ClientBase, client_defaults
from kalm_integrations.config import ClientConfig
from kalm_integrations.dispatch import Dispatcher
from kalm_integrations.errors import ConfigurationError, InvalidText
from kalm_integrations.identity import SpaceIdentity, VectorIdentity
from kalm_integrations.native_threads import wait_for
from kalm_integrations.options import ClientOptions, clear_arguments
from kalm_integrations.progress import Progress, reporting
from kalm_integrations.prompts import Role
from kalm_integrations.result import (
    ArrayBuilder,
    EmbeddedBatch,
    EmbeddingResult,
    ListBuilder,
    ResultBuilder,
)
from kalm_integrations.session import CallSettings
from kalm_integrations.signatures import documented, refuse_positional

OnError = Literal["raise", "skip"]
R = TypeVar("R")
_ROLES, _ON_ERROR = get_args(Role), get_args(OnError)


@documented(ClientOptions, defaults=client_defaults)
class KalmClient(ClientBase):
    """Embed texts with KaLM, or with the embedded engine, as numpy arrays.

    Constructing it opens nothing. One object serves any number of threads and event loops. It
    survives fork, pickling and copying; a copy and an unpickled client have connections of their
    own. Clients are equal when their arguments are.

    Example:
        >>> client = KalmClient(backend="local")
        >>> client.embed(["How tall is K2?"], role="query").vectors.shape
        (1, 512)
    """

    def __init__(self, *positional: Never, **options: Unpack[ClientOptions]) -> None:
        refuse_positional(type(self), positional)
        try:
            self._config = ClientConfig(**options)
        finally:
            clear_arguments(options)
        self._dispatcher = Dispatcher(self._config)

    @property
    def config(self) -> ClientConfig:
        return self._config

    def with_options(self, **options: Unpack[ClientOptions]) -> Self:
        """Return a client with some arguments changed, and connections of its own."""
        try:
            config = self._config.model_copy(update={**options})
        finally:
            clear_arguments(options)
        changed = type(self).__new__(type(self))
        changed.__setstate__({**self.__getstate__(), "_config": config})
        return changed

    @property
    def served_model(self) -> str:
        """Name of the model that requests name."""
        return self._config.served_model

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
        return self._collect(self._array_builder, texts, role, on_progress)

    async def aembed(
        self,
        texts: Iterable[str],
        *,
        role: Role = "document",
        on_progress: Progress | None = None,
    ) -> EmbeddingResult:
        """`embed`, without blocking the running event loop."""
        return await self._acollect(self._array_builder, texts, role, on_progress)

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
        call = self._call_settings(role, on_error, timeout_per_request=True)
        return self._dispatcher.run(self._plan_stream(texts, role, on_error), call)

    def aiter_embed(
        self,
        texts: Iterable[str],
        *,
        role: Role = "document",
        on_error: OnError = "raise",
    ) -> AsyncGenerator[EmbeddedBatch]:
        """`iter_embed`, without blocking the running event loop."""
        call = self._call_settings(role, on_error, timeout_per_request=True)
        return self._dispatcher.arun(self._plan_stream(texts, role, on_error), call)

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
        return self._with_space(wait_for(self._ensure_ready(timeout)))

    async def awarm_up(self, timeout: float | None = None) -> VectorIdentity:
        """`warm_up`, without blocking the running event loop."""
        return self._with_space(await asyncio.wrap_future(self._ensure_ready(timeout)))

    def close(self) -> None:
        """Close the connections. A later call opens new ones."""
        wait_for(self._dispatcher.close())

    async def aclose(self) -> None:
        """`close`, without blocking the running event loop."""
        await asyncio.wrap_future(self._dispatcher.close())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_dispatcher"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _dispatcher=Dispatcher(state["_config"]))

    def embed_to_lists(
        self, texts: Iterable[str], *, role: Role, on_progress: Progress | None = None
    ) -> list[list[float]]:
        """`embed`, as the lists of floats that frameworks take; faster than `to_lists()`."""
        return self._collect(self._list_builder, texts, role, on_progress)

    async def aembed_to_lists(
        self, texts: Iterable[str], *, role: Role, on_progress: Progress | None = None
    ) -> list[list[float]]:
        """`embed_to_lists`, without blocking the running event loop."""
        return await self._acollect(self._list_builder, texts, role, on_progress)

    def _array_builder(self, total: int) -> ArrayBuilder:
        dimensions, dtype = self._config.vector_dimensions, self._config.vector_dtype
        return ArrayBuilder(total, dimensions, dtype, self.vector_identity)

    def _list_builder(self, total: int) -> ListBuilder:
        return ListBuilder(total, self._config.vector_dimensions)

    def _collect(
        self,
        new_builder: Callable[[int], ResultBuilder[R]],
        texts: Iterable[str],
        role: Role,
        on_progress: Progress | None,
    ) -> R:
        call, batches, builder, progress = self._begin(new_builder, texts, role, on_progress)
        with builder.partial_on_error(), progress as advance:
            for part in self._dispatcher.run(batches, call):
                builder.add(part)
                advance(len(part))
            return builder.result()

    async def _acollect(
        self,
        new_builder: Callable[[int], ResultBuilder[R]],
        texts: Iterable[str],
        role: Role,
        on_progress: Progress | None,
    ) -> R:
        call, batches, builder, progress = self._begin(new_builder, texts, role, on_progress)
        with builder.partial_on_error(), progress as advance:
            async with aclosing(self._dispatcher.arun(batches, call)) as parts:
                async for part in parts:
                    builder.add(part)
                    advance(len(part))
            return builder.result()

    def _begin(
        self,
        new_builder: Callable[[int], ResultBuilder[R]],
        texts: Iterable[str],
        role: Role,
        on_progress: Progress | None,
    ) -> tuple[CallSettings, Iterator[Batch], ResultBuilder[R], AbstractContextManager[Progress]]:
        """Check the arguments of a call; return what `_collect` and `_acollect` share."""
        call = self._call_settings(role)
        checked = validation.check_texts(texts, self._config.truncate)
        batches, builder = self._plan(enumerate(checked), role), new_builder(len(checked))
        show = self._config.show_progress and role == "document"
        return call, batches, builder, reporting(len(checked), on_progress, show)

    def _call_settings(
        self, role: Role, on_error: OnError = "raise", timeout_per_request: bool = False
    ) -> CallSettings:
        # A misspelt word must not lose the instruction or the error.
        for name, value, known in (("role", role, _ROLES), ("on_error", on_error, _ON_ERROR)):
            if value not in known:
                raise ConfigurationError(f"{name}={value!r}: must be one of {known}.")
        timeout, skip = self._config.timeout, on_error == "skip"
        deadline = None if timeout_per_request else time.monotonic() + timeout
        return CallSettings(role=role, timeout=timeout, deadline=deadline, skip_invalid=skip)

    def _plan(self, texts: Iterable[tuple[int, str]], role: Role) -> Iterator[Batch]:
        return plan(texts, self._config.template(role), self._config.request_limits)

    def _plan_stream(self, texts: Iterable[str], role: Role, on_error: OnError) -> Iterator[Batch]:
        truncate = self._config.truncate
        blocks: Iterator[tuple[list[tuple[int, str]], list[InvalidText]]]
        if on_error == "raise" and isinstance(texts, Sequence):
            checked = validation.check_texts(texts, truncate)
            blocks = ((block, []) for block in numbered_blocks(checked))
        else:
            unchecked = numbered_blocks(validation.check_collection(texts))
            blocks = (validation.partition_valid(block, truncate) for block in unchecked)

        def batches() -> Iterator[Batch]:
            for valid, invalid in blocks:
                if invalid and on_error == "raise":
                    raise validation.invalid_input(invalid)
                if invalid:
                    yield Batch([], [], tuple(invalid))
                yield from self._plan(valid, role)

        return batches()

    def _ensure_ready(self, timeout: float | None) -> Future[SpaceIdentity | None]:
        seconds = self._config.timeout if timeout is None else timeout
        if not seconds > 0:
            raise ConfigurationError(f"timeout={timeout!r}: must be a number of seconds over 0.")
        return self._dispatcher.ensure_ready(seconds)

    def _with_space(self, space: SpaceIdentity | None) -> VectorIdentity:
        return replace(self.vector_identity, space=space or self._config.expected_space)
