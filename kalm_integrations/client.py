"""`KalmClient`: texts in, numpy vectors out, over any door, from any thread or loop.

Both adapters are this class with their framework's method names. Requests run on the process's
I/O thread; what is the caller's (its iterator, its callbacks, its progress bar) stays on the
caller's side. The sync and async methods differ in how they wait, and in nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from itertools import islice
from typing import Literal, Self, get_args

from pydantic import PrivateAttr

from kalm_integrations import validation
from kalm_integrations.batching import Batch, plan
from kalm_integrations.dispatch import Dispatcher
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.identity import SpaceIdentity, VectorIdentity
from kalm_integrations.options import ClientConfig
from kalm_integrations.prompts import Role
from kalm_integrations.result import (
    ArrayBuilder,
    EmbeddedBatch,
    EmbeddingResult,
    ListBuilder,
    ResultBuilder,
)
from kalm_integrations.session import Call

log = logging.getLogger(__name__)
_BLOCK = 8192  # texts that `iter_embed` reads ahead and looks for copies in

OnError = Literal["raise", "skip"]
Progress = Callable[[int], object]
_ROLES, _ON_ERROR = get_args(Role), get_args(OnError)


class KalmClient(ClientConfig):
    """Embed texts with KaLM, or with the embedded engine, as numpy arrays.

    Takes the arguments of `ClientConfig`. Constructing it opens nothing. One object serves any
    number of threads and event loops; it survives fork, pickling and copying, and its
    connections close with the process at the latest.

    Example:
        >>> client = KalmClient(backend="local")
        >>> client.embed(["How tall is K2?"], role="query").vectors.shape
        (1, 512)
    """

    _dispatcher: Dispatcher | None = PrivateAttr(default=None)

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
        checked = validation.check_texts(texts, self.truncate)
        builder = ArrayBuilder(len(checked), self.vector_dimensions)
        with builder.partial_on_error():
            self._fill(builder, checked, role, on_progress)
            return builder.result(self.vector_dtype, self.vector_identity)

    async def aembed(
        self,
        texts: Iterable[str],
        *,
        role: Role = "document",
        on_progress: Progress | None = None,
    ) -> EmbeddingResult:
        """`embed`, without blocking the running event loop."""
        checked = validation.check_texts(texts, self.truncate)
        builder = ArrayBuilder(len(checked), self.vector_dimensions)
        with builder.partial_on_error():
            await self._afill(builder, checked, role, on_progress)
            return builder.result(self.vector_dtype, self.vector_identity)

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
        return self.dispatcher.run(batches, self._call(role, on_error, each_request=True))

    def aiter_embed(
        self,
        texts: Iterable[str],
        *,
        role: Role = "document",
        on_error: OnError = "raise",
    ) -> AsyncGenerator[EmbeddedBatch]:
        """`iter_embed`, without blocking the running event loop."""
        batches = self._plan_stream(texts, role, on_error)
        return self.dispatcher.arun(batches, self._call(role, on_error, each_request=True))

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
        ready = self.dispatcher.ensure_ready(self._ready_timeout(timeout))
        return self._identity_of(ready.result())

    async def awarm_up(self, timeout: float | None = None) -> VectorIdentity:
        """`warm_up`, without blocking the running event loop."""
        ready = self.dispatcher.ensure_ready(self._ready_timeout(timeout))
        return self._identity_of(await asyncio.wrap_future(ready))

    def close(self) -> None:
        """Close the connections. A later call opens new ones."""
        self.dispatcher.close().result()

    async def aclose(self) -> None:
        """`close`, without blocking the running event loop."""
        await asyncio.wrap_future(self.dispatcher.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __copy__(self) -> Self:
        copied = super().__copy__()
        copied._dispatcher = None
        return copied

    def _embed_to_lists(
        self, texts: Iterable[str], role: Role, on_progress: Progress | None = None
    ) -> list[list[float]]:
        """`embed`, to what frameworks take, in less time and memory than over an array."""
        checked = validation.check_texts(texts, self.truncate)
        builder = ListBuilder(len(checked), self.vector_dimensions)
        with builder.partial_on_error():
            self._fill(builder, checked, role, on_progress)
            return builder.result()

    async def _aembed_to_lists(
        self, texts: Iterable[str], role: Role, on_progress: Progress | None = None
    ) -> list[list[float]]:
        checked = validation.check_texts(texts, self.truncate)
        builder = ListBuilder(len(checked), self.vector_dimensions)
        with builder.partial_on_error():
            await self._afill(builder, checked, role, on_progress)
            return builder.result()

    def _fill(
        self, builder: ResultBuilder, texts: list[str], role: Role, on_progress: Progress | None
    ) -> None:
        with self._progress(len(texts), role, on_progress) as advance:
            call = self._call(role)
            for part in self.dispatcher.run(self._plan(enumerate(texts), role), call):
                builder.add(part)
                advance(len(part))

    async def _afill(
        self, builder: ResultBuilder, texts: list[str], role: Role, on_progress: Progress | None
    ) -> None:
        with self._progress(len(texts), role, on_progress) as advance:
            call = self._call(role)
            parts = self.dispatcher.arun(self._plan(enumerate(texts), role), call)
            async with aclosing(parts):
                async for part in parts:
                    builder.add(part)
                    advance(len(part))

    def _call(self, role: Role, on_error: OnError = "raise", each_request: bool = False) -> Call:
        # Taken for another, a misspelt word would cost the instruction, or the error.
        for name, value, known in (("role", role, _ROLES), ("on_error", on_error, _ON_ERROR)):
            if value not in known:
                raise ConfigurationError(f"{name}={value!r}: it is one of {known}.")
        deadline = None if each_request else time.monotonic() + self.timeout
        return Call(
            role=role, timeout=self.timeout, deadline=deadline, skip_invalid=on_error == "skip"
        )

    def _plan(self, texts: Iterable[tuple[int, str]], role: Role) -> Iterator[Batch]:
        return plan(texts, self.template(role), self.request_limits)

    def _plan_stream(self, texts: Iterable[str], role: Role, on_error: OnError) -> Iterator[Batch]:
        read = validation.check_collection(texts)
        if on_error == "raise" and isinstance(read, Sequence):
            read = validation.check_texts(read, self.truncate)

        def batches() -> Iterator[Batch]:
            numbered = enumerate(read)
            while block := list(islice(numbered, _BLOCK)):
                valid, invalid = validation.partition_valid(block, self.truncate)
                if invalid and on_error == "raise":
                    raise validation.invalid_input(invalid)
                if invalid:
                    yield Batch([], [], tuple(invalid))
                yield from self._plan(valid, role)

        return batches()

    @property
    def dispatcher(self) -> Dispatcher:
        if self._dispatcher is None:
            self._dispatcher = Dispatcher(self.without_client())
        return self._dispatcher

    def _ready_timeout(self, timeout: float | None) -> float:
        limit = self.timeout if timeout is None else timeout
        if not limit > 0:
            raise ConfigurationError(f"timeout={timeout!r}: must be a number of seconds over 0.")
        return limit

    def _identity_of(self, served: SpaceIdentity | None) -> VectorIdentity:
        return replace(self.vector_identity, space=served or self.expected_space)

    @contextmanager
    def _progress(self, total: int, role: Role, on_progress: Progress | None) -> Iterator[Progress]:
        if on_progress is not None:
            yield on_progress
        elif self.show_progress and role == "document" and total > 1:
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
