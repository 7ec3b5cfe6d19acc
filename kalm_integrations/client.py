"""`KalmClient`: texts in, numpy vectors out, from any thread or event loop.

Both adapters hold one. Requests run on the process's background event loop. The caller's own code
(its iterator, its callbacks, its progress bar) runs on the caller's thread. The sync and async
methods differ only in how they wait.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, Literal, Never, Self, Unpack, get_args

from kalm_integrations import validation
from kalm_integrations.batching import Batch, plan
from kalm_integrations.dispatch import Dispatcher
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.identity import SpaceIdentity, VectorIdentity
from kalm_integrations.options import ClientConfig, ClientOptions, forget
from kalm_integrations.prompts import Role
from kalm_integrations.result import (
    ArrayBuilder,
    EmbeddedBatch,
    EmbeddingResult,
    ListBuilder,
    ResultBuilder,
)
from kalm_integrations.session import Call
from kalm_integrations.signatures import documented, refuse_positional

log = logging.getLogger(__name__)
_BLOCK = 8192  # texts that `iter_embed` reads ahead and looks for copies in

OnError = Literal["raise", "skip"]
Progress = Callable[[int], object]
_ROLES, _ON_ERROR = get_args(Role), get_args(OnError)


def defaults() -> dict[str, Any]:
    """The default of each argument, `client` of the adapters included."""
    return {"client": None} | {n: field.default for n, field in ClientConfig.model_fields.items()}


class ContextManaged:
    """Closes its connections when a `with` or `async with` block ends."""

    def close(self) -> None:
        """Close the connections. A later call opens new ones."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """`close`, without blocking the running event loop."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


@documented(ClientOptions, defaults=defaults)
class KalmClient(ContextManaged):
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
            forget(options)
        self._dispatcher = Dispatcher(self._config)

    @property
    def config(self) -> ClientConfig:
        """All arguments, validated, and what follows from them. It cannot be changed."""
        return self._config

    def with_options(self, **options: Unpack[ClientOptions]) -> Self:
        """Return a client with some arguments changed, and connections of its own."""
        try:
            config = self._config.model_copy(update={**options})
        finally:
            forget(options)
        changed = type(self).__new__(type(self))
        changed.__setstate__({**self.__getstate__(), "_config": config})
        return changed

    @property
    def served_model(self) -> str:
        """Name of the model that requests name."""
        return self._config.served_model

    @property
    def vector_dimensions(self) -> int:
        """Dimensions of the vectors; 0 until the first answer for a model without a profile."""
        return self._config.vector_dimensions

    @property
    def vector_identity(self) -> VectorIdentity:
        """What an index of this client's document vectors contains; see `ClientConfig`."""
        return self._config.vector_identity

    @property
    def cache_namespace(self) -> str:
        """Name for a cache of document vectors: changes exactly when they may."""
        return self._config.cache_namespace

    @property
    def query_cache_namespace(self) -> str:
        """Name for a cache of query vectors. Never share one cache between both roles."""
        return self._config.query_cache_namespace

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
        checked = validation.check_texts(texts, self._config.truncate)
        builder = ArrayBuilder(len(checked), self._config.vector_dimensions)
        with builder.partial_on_error():
            self._fill(builder, checked, role, on_progress)
            return builder.result(self._config.vector_dtype, self.vector_identity)

    async def aembed(
        self,
        texts: Iterable[str],
        *,
        role: Role = "document",
        on_progress: Progress | None = None,
    ) -> EmbeddingResult:
        """`embed`, without blocking the running event loop."""
        checked = validation.check_texts(texts, self._config.truncate)
        builder = ArrayBuilder(len(checked), self._config.vector_dimensions)
        with builder.partial_on_error():
            await self._afill(builder, checked, role, on_progress)
            return builder.result(self._config.vector_dtype, self.vector_identity)

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
        batches = self._plan_stream(texts, role, on_error)
        return self._dispatcher.run(batches, self._call(role, on_error, each_request=True))

    def aiter_embed(
        self,
        texts: Iterable[str],
        *,
        role: Role = "document",
        on_error: OnError = "raise",
    ) -> AsyncGenerator[EmbeddedBatch]:
        """`iter_embed`, without blocking the running event loop."""
        batches = self._plan_stream(texts, role, on_error)
        return self._dispatcher.arun(batches, self._call(role, on_error, each_request=True))

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
        ready = self._dispatcher.ensure_ready(self._ready_timeout(timeout))
        return self._identity_in(ready.result())

    async def awarm_up(self, timeout: float | None = None) -> VectorIdentity:
        """`warm_up`, without blocking the running event loop."""
        ready = self._dispatcher.ensure_ready(self._ready_timeout(timeout))
        return self._identity_in(await asyncio.wrap_future(ready))

    def close(self) -> None:
        """Close the connections. A later call opens new ones."""
        self._dispatcher.close().result()

    async def aclose(self) -> None:
        """`close`, without blocking the running event loop."""
        await asyncio.wrap_future(self._dispatcher.close())

    def __repr__(self) -> str:
        config = vars(self).get("_config")  # absent while a traceback of the constructor is shown
        return f"{type(self).__name__}({config.__repr_str__(', ') if config else ''})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._config == self._config

    def __hash__(self) -> int:
        return hash(self._config)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ClientConfig.model_fields:
            raise AttributeError(f"{name} is fixed: use with_options({name}=...) or a new client")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_dispatcher"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _dispatcher=Dispatcher(state["_config"]))

    def embed_to_lists(
        self, texts: Iterable[str], role: Role, on_progress: Progress | None = None
    ) -> list[list[float]]:
        """`embed`, as the lists of floats that frameworks take; faster than `to_lists()`."""
        checked = validation.check_texts(texts, self._config.truncate)
        builder = ListBuilder(len(checked), self._config.vector_dimensions)
        with builder.partial_on_error():
            self._fill(builder, checked, role, on_progress)
            return builder.result()

    async def aembed_to_lists(
        self, texts: Iterable[str], role: Role, on_progress: Progress | None = None
    ) -> list[list[float]]:
        """`embed_to_lists`, without blocking the running event loop."""
        checked = validation.check_texts(texts, self._config.truncate)
        builder = ListBuilder(len(checked), self._config.vector_dimensions)
        with builder.partial_on_error():
            await self._afill(builder, checked, role, on_progress)
            return builder.result()

    def _fill(
        self, builder: ResultBuilder, texts: list[str], role: Role, on_progress: Progress | None
    ) -> None:
        with self._progress(len(texts), role, on_progress) as advance:
            call = self._call(role)
            for part in self._dispatcher.run(self._plan(enumerate(texts), role), call):
                builder.add(part)
                advance(len(part))

    async def _afill(
        self, builder: ResultBuilder, texts: list[str], role: Role, on_progress: Progress | None
    ) -> None:
        with self._progress(len(texts), role, on_progress) as advance:
            call = self._call(role)
            parts = self._dispatcher.arun(self._plan(enumerate(texts), role), call)
            async with aclosing(parts):
                async for part in parts:
                    builder.add(part)
                    advance(len(part))

    def _call(self, role: Role, on_error: OnError = "raise", each_request: bool = False) -> Call:
        # A misspelt word must not lose the instruction or the error.
        for name, value, known in (("role", role, _ROLES), ("on_error", on_error, _ON_ERROR)):
            if value not in known:
                raise ConfigurationError(f"{name}={value!r}: must be one of {known}.")
        deadline = None if each_request else time.monotonic() + self._config.timeout
        return Call(
            role=role,
            timeout=self._config.timeout,
            deadline=deadline,
            skip_invalid=on_error == "skip",
        )

    def _plan(self, texts: Iterable[tuple[int, str]], role: Role) -> Iterator[Batch]:
        return plan(texts, self._config.template(role), self._config.request_limits)

    def _plan_stream(self, texts: Iterable[str], role: Role, on_error: OnError) -> Iterator[Batch]:
        collection = validation.check_collection(texts)
        if on_error == "raise" and isinstance(collection, Sequence):
            collection = validation.check_texts(collection, self._config.truncate)

        def batches() -> Iterator[Batch]:
            numbered = enumerate(collection)
            while block := list(islice(numbered, _BLOCK)):
                valid, invalid = validation.partition_valid(block, self._config.truncate)
                if invalid and on_error == "raise":
                    raise validation.invalid_input(invalid)
                if invalid:
                    yield Batch([], [], tuple(invalid))
                yield from self._plan(valid, role)

        return batches()

    def _ready_timeout(self, timeout: float | None) -> float:
        seconds = self._config.timeout if timeout is None else timeout
        if not seconds > 0:
            raise ConfigurationError(f"timeout={timeout!r}: must be a number of seconds over 0.")
        return seconds

    def _identity_in(self, space: SpaceIdentity | None) -> VectorIdentity:
        return replace(self.vector_identity, space=space or self._config.expected_space)

    @contextmanager
    def _progress(self, total: int, role: Role, on_progress: Progress | None) -> Iterator[Progress]:
        if on_progress is not None:
            yield on_progress
        elif self._config.show_progress and role == "document" and total > 1:
            with progress_bar(total) as advance:
                yield advance
        else:
            yield lambda _: None


@contextmanager
def progress_bar(total: int, what: str = "Embedding") -> Iterator[Progress]:
    """A bar on stderr, or a widget in a notebook; yields what moves it on."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit=" texts") as bar:
        yield bar.update
