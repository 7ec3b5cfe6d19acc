"""What takes an engine's place when none can be trusted: it answers everything with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from kalm_integrations.errors import KalmError
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.prompts import AS_IS, Role
from kalm_integrations.protocol import Truncate
from modal_backend.engines.base import EngineOutput, Progress, no_progress


class FailedEngine:
    """Raises `failure` for whatever it is asked."""

    dimensions: tuple[int, ...] = ()
    max_tokens = 0
    query_template = AS_IS

    def __init__(self, failure: KalmError) -> None:
        self.failure = failure

    @property
    def identity(self) -> SpaceIdentity:
        raise copy(self.failure)  # of its own, with a traceback of its own

    async def embed(
        self,
        texts: Sequence[str],
        *,
        role: Role,
        truncate: Truncate,
        deadline: float | None,
        progress: Progress = no_progress,
    ) -> EngineOutput:
        raise copy(self.failure)

    async def warm_up(self) -> None: ...

    async def died(self) -> KalmError:
        return copy(self.failure)

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...

    async def close(self) -> None: ...
