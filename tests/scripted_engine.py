"""An engine that does what a test tells it to. The vectors are those of `scripted`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scripted import DIMENSIONS, vectors_of

from kalm_integrations.errors import KalmError
from kalm_integrations.models import EMBEDDED
from kalm_integrations.prompts import AS_IS, Role
from kalm_integrations.protocol import Truncate
from modal_backend.engines.base import EngineOutput, Progress, no_progress

Vectors = np.ndarray[Any, Any]


class ScriptedEngine:
    """See the module.

    Args:
        spoil: Applied to the right vectors of each call.
        faults: What "embed", "warm_up", "sleep", "wake" or "close" raise.
        log: Where calls are noted, by the engine's name.
    """

    identity = EMBEDDED.space
    dimensions = (DIMENSIONS,)
    max_tokens = 8192
    query_template = AS_IS

    def __init__(
        self,
        spoil: Callable[[Vectors], Vectors] = lambda vectors: vectors,
        *,
        faults: Mapping[str, BaseException] | None = None,
        log: list[str] | None = None,
        name: str = "engine",
    ) -> None:
        self.spoil = spoil
        self.faults = dict(faults or {})
        self.log = [] if log is None else log
        self.name = name
        self.death: KalmError | None = None
        """What `died` returns, once it is set."""
        self.asked: list[tuple[list[str], dict[str, Any]]] = []

    async def embed(
        self,
        texts: Sequence[str],
        *,
        role: Role,
        truncate: Truncate,
        deadline: float | None,
        progress: Progress = no_progress,
    ) -> EngineOutput:
        self.asked.append((list(texts), {"role": role, "truncate": truncate, "deadline": deadline}))
        self._note("embed")
        return EngineOutput(self.spoil(self.right(texts)), len(texts))

    def right(self, texts: Sequence[str]) -> Vectors:
        """What is spoilt."""
        return vectors_of(texts, "float32")

    async def warm_up(self) -> None:
        self._note("warm_up")

    async def died(self) -> KalmError:
        while self.death is None:
            await asyncio.sleep(0.01)
        return self.death

    async def sleep(self) -> None:
        self._note("sleep")

    async def wake(self) -> None:
        self._note("wake")

    async def close(self) -> None:
        self._note("close")

    def _note(self, what: str) -> None:
        self.log.append(f"{self.name} {what}")
        if what in self.faults:
            raise self.faults[what]
