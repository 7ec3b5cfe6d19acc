"""An engine that costs nothing, so that what is measured is all the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.prompts import AS_IS, Role
from kalm_integrations.protocol import Truncate
from modal_backend.engines.base import EngineOutput, Progress, no_progress

MODEL = "instant"
DIMENSIONS = 3840


class InstantEngine:
    """Unit vectors of KaLM's width, made beforehand."""

    dimensions = (DIMENSIONS,)
    max_tokens = 8192
    query_template = AS_IS
    identity = SpaceIdentity.undeclared(MODEL)

    def __init__(self) -> None:
        rows = np.random.default_rng(0).standard_normal((2048, DIMENSIONS), dtype=np.float32)
        self.rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)

    async def embed(
        self,
        texts: Sequence[str],
        *,
        role: Role,
        truncate: Truncate,
        deadline: float | None,
        progress: Progress = no_progress,
    ) -> EngineOutput:
        return EngineOutput(self.rows[: len(texts)], len(texts))

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...

    async def close(self) -> None: ...
