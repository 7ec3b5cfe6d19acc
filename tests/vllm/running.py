"""Engines with real vLLM, on this machine's CPU, and what they leave behind."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from reference import reference_vectors, token_ids

from kalm_integrations.prompts import Role
from kalm_integrations.protocol import Truncate
from modal_backend.engines.base import EngineOutput
from modal_backend.engines.vllm.config import VLLMOptions
from modal_backend.engines.vllm.engine import VLLMEngine
from modal_backend.weights import locate

SMALL: dict[str, Any] = {
    "dtype": "fp32",
    "enforce_eager": True,
    # Less than the longest texts have: those are computed in several steps, beside others.
    "max_num_batched_tokens": 256,
    "max_num_seqs": 64,
}
"""Options of the engines here, unless a test says otherwise."""


LENGTHS = (2, 3, 8, 31, 32, 33, 63, 64, 65, 150, 255, 256, 257, 300, 513, 700, 2047, 2048)
"""Tokens: around one and several sliding windows (32), around a step (256), to the maximum."""


@dataclass(frozen=True)
class Texts:
    """Texts, with what their vectors and numbers of tokens have to be."""

    texts: list[str]
    vectors: NDArray[np.float32]
    tokens: list[int]

    @classmethod
    def of(cls, model: Path, texts: list[str], **reference: Any) -> Texts:
        """Let transformers say."""
        tokens = [len(token_ids(model, text)) for text in texts]
        return cls(texts, reference_vectors(model, texts, **reference), tokens)

    def take(self, rows: list[int]) -> tuple[list[str], NDArray[np.float32]]:
        """Some of them, in this order, and their vectors."""
        return [self.texts[row] for row in rows], self.vectors[rows]


@asynccontextmanager
async def running(
    model: Path | str, revision: str | None = None, **options: Any
) -> AsyncIterator[VLLMEngine]:
    """An engine over a folder, or over a repository in the Hugging Face cache."""
    engine = await VLLMEngine.load(
        locate(str(model), revision), VLLMOptions(**{**SMALL, **options})
    )
    try:
        yield engine
    finally:
        await engine.close()


async def embed(
    engine: VLLMEngine,
    texts: Sequence[str],
    role: Role = "document",
    truncate: Truncate = "error",
) -> EngineOutput:
    """Without a deadline."""
    return await engine.embed(texts, role=role, truncate=truncate, deadline=None)


def children() -> set[int]:
    """The processes that this one has started, theirs too. Not counted is the one in which
    `multiprocessing` keeps its books: it ends with the interpreter."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and "multiprocessing.resource_tracker" not in " ".join(process.cmdline()):
                found.add(process.pid)
        except psutil.NoSuchProcess:
            pass
    return found


def left_behind(before: set[int], patience: float = 5.0) -> set[int]:
    """Processes that are there and were not `before`, once they have had time to end."""
    deadline = time.monotonic() + patience
    while (new := children() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return new
