"""Engines: one protocol, one module each. An engine turns texts into native vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.errors import InvalidResponseError, KalmError
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.prompts import Role
from kalm_integrations.protocol import Truncate

Progress = Callable[[int], None]
"""Called with the number of texts that are computed so far, the first ones of the call. It may
raise to end the call."""


def no_progress(texts: int) -> None:
    """A `Progress` that does nothing."""


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """Native vectors, shape (texts, dimensions[0]), float32, unit length; tokens that the model
    read, all texts together."""

    vectors: NDArray[np.float32]
    tokens: int


class Engine(Protocol):
    """A loaded model.

    Attributes:
        identity: Read off what was loaded, never off settings.
        dimensions: Numbers of dimensions that its vectors can be cut to, the native one first.
        max_tokens: Longest text.
        query_template: What the model wants a query to be set into.
    """

    @property
    def identity(self) -> SpaceIdentity: ...

    @property
    def dimensions(self) -> tuple[int, ...]: ...

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
            role: Chooses the priority.
            truncate: For texts over `max_tokens`.
            deadline: On the clock of `time.monotonic`; what has not started by then is dropped.
            progress: Called on the event loop, before the first text is computed and while the
                others are.

        Raises:
            InputTooLongError: Texts over `max_tokens`, with truncate="error"; all are named.
            DeadlineExceededError: The deadline passed.
            KalmError: Every other failure, translated: no engine exception leaves an engine.
        """
        ...

    async def warm_up(self) -> None:
        """Do what is done at first use, before the first caller comes."""
        ...

    async def died(self) -> KalmError:
        """Wait for as long as the engine can embed. Returns what callers are told afterwards."""
        ...

    async def sleep(self) -> None:
        """Hold as little as can be, for a snapshot; nothing is embedded before `wake`."""
        ...

    async def wake(self) -> None:
        """Be ready again."""
        ...

    async def close(self) -> None:
        """Free what it holds. It is not used afterwards."""
        ...


def check_shape(vectors: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Compare what a model returned with the place that it is copied to: numpy would repeat a
    single vector, or a single number, until the place is full.

    Args:
        vectors: What the model returned.
        shape: Of the place.

    Raises:
        InvalidResponseError: They differ.
    """
    if vectors.shape != shape:
        raise InvalidResponseError(f"the engine gave {vectors.shape} instead of {shape}.")
