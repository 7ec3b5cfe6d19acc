"""The protocol of an engine, which turns texts into native vectors, and its helpers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.errors import (
    DeadlineExceededError,
    InvalidResponseError,
    KalmError,
    ServiceUnavailableError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.prompts import Role
from kalm_integrations.protocol import Truncate

Progress = Callable[[int], None]
"""Called with the number of leading texts of the call that are computed. May raise to end it."""

PRIORITY: Final[dict[Role, int]] = {"query": 0, "document": 1}
"""The smaller number goes first."""

LIVENESS_SECONDS: Final = 0.25
"""Interval at which an engine checks whether its process is alive."""


def no_progress(texts: int) -> None:
    """A `Progress` that does nothing."""


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """Native unit vectors, float32, shape (texts, dimensions[0]); the tokens that were computed;
    which texts were cut, by index."""

    vectors: NDArray[np.float32]
    tokens: int
    truncated: tuple[int, ...] = ()


class Engine(Protocol):
    """A loaded model."""

    @property
    def identity(self) -> SpaceIdentity:
        """Read from the loaded model, never from settings."""
        ...

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Supported numbers of dimensions, the native one first."""
        ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def query_template(self) -> str: ...

    async def embed(
        self,
        texts: Sequence[str],
        *,
        role: Role,
        truncate: Truncate,
        deadline: float | None,
        progress: Progress = no_progress,
    ) -> EngineOutput:
        """Embed texts, queries before documents.

        Args:
            texts: Valid texts (see `kalm_integrations.validation`).
            role: Decides the priority.
            truncate: What to do with texts over `max_tokens`.
            deadline: A time of `time.monotonic`; work not started by then is dropped.
            progress: Called on the event loop before the first text is computed and after others.

        Raises:
            InputTooLongError: Names all texts over `max_tokens`, with truncate="error".
            DeadlineExceededError: The deadline passed.
            KalmError: Any other failure. No foreign exception leaves an engine.
        """
        ...

    async def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special ones included; that of a text far over `max_tokens` is an
        estimate. Embeds nothing, and delays no query."""
        ...

    async def warm_up(self) -> None:
        """Compile and allocate what the first texts would otherwise wait for."""
        ...

    async def died(self) -> KalmError:
        """Wait until the engine can no longer embed; return the error for later callers."""
        ...

    async def sleep(self) -> None:
        """Release memory before a snapshot. Nothing is embedded until `wake`."""
        ...

    async def wake(self) -> None:
        """Undo `sleep`."""
        ...

    async def close(self) -> None:
        """Free all resources. The engine is not used afterwards."""
        ...


class EngineBase:
    """An engine that has nothing to warm up, to move or to free."""

    async def warm_up(self) -> None: ...

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...

    async def close(self) -> None: ...


@asynccontextmanager
async def within(deadline: float | None) -> AsyncGenerator[None]:
    """Cancel the block at `deadline`, a time of `time.monotonic`, and raise
    `DeadlineExceededError`."""
    try:
        async with asyncio.timeout_at(deadline) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceededError("the deadline passed before all was embedded.") from None


def over_limit(counts: Sequence[int], limit: int, start: int = 0) -> list[int]:
    """Indices, counted from `start`, of the texts that have more than `limit` tokens."""
    return [index for index, tokens in enumerate(counts, start) if tokens > limit]


def check_shape(vectors: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raise `InvalidResponseError` unless a model's output has this shape; numpy broadcasts."""
    if vectors.shape != shape:
        raise InvalidResponseError(f"the engine returned {vectors.shape} instead of {shape}.")


def stopping_error() -> KalmError:
    """The error of calls in progress when an engine is closed."""
    return ServiceUnavailableError("the service is stopping.", retry_after=1.0)
