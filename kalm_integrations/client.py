"""`KalmClient`: texts in, numpy vectors out, from any thread or event loop.

The adapters hold one. The sync and async methods differ only in how they wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, aclosing, closing
from dataclasses import replace
from functools import partial
from typing import Any, Final, Never, Self, TypeVar, Unpack, get_args

from kalm_integrations import validation
from kalm_integrations.batching import Batch, RequestLimits, numbered_blocks, plan
from kalm_integrations.client_base import ClientBase, OnError, client_defaults
from kalm_integrations.config import ClientConfig
from kalm_integrations.dispatch import Dispatcher
from kalm_integrations.errors import ConfigurationError, InvalidText, KalmError
from kalm_integrations.identity import SpaceIdentity, VectorIdentity
from kalm_integrations.options import ClientOptions, clear_arguments
from kalm_integrations.progress import Progress, reporting
from kalm_integrations.prompts import Role
from kalm_integrations.result import (
    ArrayBuilder,
    ListBuilder,
    OnTruncated,
    ResultBuilder,
)
from kalm_integrations.session import CallSettings
from kalm_integrations.signatures import documented, refuse_positional

R = TypeVar("R")
_ROLES, _ON_ERROR = get_args(Role), get_args(OnError)
_COUNTED_AT_ONCE: Final = RequestLimits(
    texts=2048, bytes=2**20, tokens=2**20, characters=validation.MAX_CHARACTERS + 1
)
"""No GPU computes them, and the response is small."""


@documented(ClientOptions, defaults=client_defaults)
class KalmClient(ClientBase):
    """Embed texts with KaLM, or with the embedded engine, as numpy arrays.

    Constructing it opens nothing. One object serves any number of threads and event loops. It
    survives fork, pickling and copying; a copy and an unpickled client have connections of their
    own. Clients are equal when their arguments are.

    Examples:
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
    def client(self) -> KalmClient:
        return self

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

    def embed_to_lists(
        self,
        texts: Iterable[str],
        *,
        role: Role,
        on_progress: Progress | None = None,
        on_truncated: OnTruncated | None = None,
    ) -> list[list[float]]:
        """`embed`, as the lists of floats that frameworks take; faster than `to_lists()`.

        `on_truncated` gets the indices of the texts that were cut; by default, they are logged.
        """
        builder = partial(self._list_builder, on_truncated=on_truncated)
        return self._collect(builder, texts, role, on_progress)

    async def aembed_to_lists(
        self,
        texts: Iterable[str],
        *,
        role: Role,
        on_progress: Progress | None = None,
        on_truncated: OnTruncated | None = None,
    ) -> list[list[float]]:
        """`embed_to_lists`, without blocking the running event loop."""
        builder = partial(self._list_builder, on_truncated=on_truncated)
        return await self._acollect(builder, texts, role, on_progress)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_dispatcher"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _dispatcher=Dispatcher(state["_config"]))

    def _array_builder(self, total: int) -> ArrayBuilder:
        dtype, dimensions = self._config.vector_dtype, self._dispatcher.dimensions
        return ArrayBuilder(total, dimensions, dtype, self.vector_identity)

    def _list_builder(self, total: int, on_truncated: OnTruncated | None) -> ListBuilder:
        return ListBuilder(total, self._dispatcher.dimensions, on_truncated)

    def _count_tokens(self, texts: Iterable[str], role: Role) -> Future[list[int]]:
        _check_choice("role", role, _ROLES)
        timeout = self._config.timeout
        call = CallSettings(role=role, timeout=timeout, deadline=time.monotonic() + timeout)
        checked = validation.check_texts(texts, "end")
        batches = plan(enumerate(checked), self._dispatcher.templates[role], _COUNTED_AT_ONCE)
        return self._dispatcher.count_tokens(list(batches), call, len(checked))

    def _collect(
        self,
        new_builder: Callable[[int], ResultBuilder[R]],
        texts: Iterable[str],
        role: Role,
        on_progress: Progress | None,
    ) -> R:
        batches, call, builder, progress = self._begin(new_builder, texts, role, on_progress)
        try:
            with progress as advance, closing(self._dispatcher.run(batches, call)) as parts:
                for part in parts:
                    builder.add(part)
                    advance(len(part.indices))
            return builder.result()
        except KalmError as error:
            error.partial = builder.partial()
            raise

    async def _acollect(
        self,
        new_builder: Callable[[int], ResultBuilder[R]],
        texts: Iterable[str],
        role: Role,
        on_progress: Progress | None,
    ) -> R:
        batches, call, builder, progress = self._begin(new_builder, texts, role, on_progress)
        try:
            with progress as advance:
                async with aclosing(self._dispatcher.arun(batches, call)) as parts:
                    async for part in parts:
                        builder.add(part)
                        advance(len(part.indices))
            return builder.result()
        except KalmError as error:
            error.partial = builder.partial()
            raise

    def _begin(
        self,
        new_builder: Callable[[int], ResultBuilder[R]],
        texts: Iterable[str],
        role: Role,
        on_progress: Progress | None,
    ) -> tuple[Iterator[Batch], CallSettings, ResultBuilder[R], AbstractContextManager[Progress]]:
        """Check the arguments of a call; return what `_collect` and `_acollect` share."""
        _check_choice("role", role, _ROLES)
        timeout = self._config.timeout
        call = CallSettings(role=role, timeout=timeout, deadline=time.monotonic() + timeout)
        checked = validation.check_texts(texts, self._config.truncate)
        show = self._config.show_progress and role == "document"
        progress = reporting(len(checked), on_progress, show)
        return self._plan(enumerate(checked), role), call, new_builder(len(checked)), progress

    def _plan(self, texts: Iterable[tuple[int, str]], role: Role) -> Iterator[Batch]:
        return plan(texts, self._dispatcher.templates[role], self._dispatcher.limits)

    def _stream(
        self, texts: Iterable[str], role: Role, on_error: OnError
    ) -> tuple[Iterator[Batch], CallSettings]:
        """Check the arguments of `iter_embed`; return what the dispatcher takes."""
        _check_choice("role", role, _ROLES)
        _check_choice("on_error", on_error, _ON_ERROR)
        truncate, skip = self._config.truncate, on_error == "skip"
        blocks: Iterator[tuple[list[tuple[int, str]], list[InvalidText]]]
        if not skip and isinstance(texts, Sequence):
            checked = validation.check_texts(texts, truncate)
            blocks = ((block, []) for block in numbered_blocks(checked))
        else:
            unchecked = numbered_blocks(validation.check_collection(texts))
            blocks = (validation.partition_valid(block, truncate) for block in unchecked)

        def batches() -> Iterator[Batch]:
            for valid, invalid in blocks:
                if invalid and not skip:
                    raise validation.invalid_input(invalid)
                if invalid:
                    yield Batch([], [], tuple(invalid))
                yield from self._plan(valid, role)

        timeout = self._config.timeout
        return batches(), CallSettings(role=role, timeout=timeout, skip_invalid=skip)

    def _ensure_ready(self, timeout: float | None) -> Future[SpaceIdentity | None]:
        seconds = self._config.timeout if timeout is None else timeout
        if not seconds > 0:
            raise ConfigurationError(f"timeout={timeout!r}: must be a number of seconds over 0.")
        return self._dispatcher.ensure_ready(seconds)

    def _with_space(self, space: SpaceIdentity | None) -> VectorIdentity:
        return replace(self.vector_identity, space=space or self._config.expected_space)


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    # A misspelt word must not lose the instruction or the error.
    if value not in known:
        raise ConfigurationError(f"{name}={value!r}: must be one of {known}.")
