"""Stands in for an engine that could not be loaded or is not trusted."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from kalm_integrations.errors import KalmError
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.prompts import AS_IS
from modal_backend.engines.base import EngineBase, EngineOutput


class FailedEngine(EngineBase):
    """Raises a copy of `failure`, with a traceback of its own, in every call."""

    dimensions: tuple[int, ...] = ()
    max_tokens = 0
    query_template = AS_IS

    def __init__(self, failure: KalmError) -> None:
        self.failure = failure

    @property
    def identity(self) -> SpaceIdentity:
        raise copy(self.failure)

    async def embed(self, texts: Sequence[str], **_: Any) -> EngineOutput:
        raise copy(self.failure)

    async def count_tokens(self, texts: Sequence[str]) -> list[int]:
        raise copy(self.failure)

    async def died(self) -> KalmError:
        return copy(self.failure)
