"""The app that `modal_rpc.py` measures: the real RPC door over an engine that costs nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import modal
import numpy as np

from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.prompts import AS_IS, Role
from kalm_integrations.wire import Truncate
from modal_backend import rpc
from modal_backend.engines import EngineOutput
from modal_backend.service import EmbeddingService

MODEL = "random-3840"
app = modal.App("rpc-benchmark")
image = modal.Image.debian_slim().add_local_python_source("kalm_integrations", "modal_backend")


class RandomEngine:
    """Unit vectors of KaLM's width, made beforehand."""

    dimensions = (3840,)
    max_tokens = 8192
    query_template = AS_IS
    identity = SpaceIdentity.undeclared(MODEL)

    def __init__(self) -> None:
        rows = np.random.default_rng(0).standard_normal((2048, 3840), dtype=np.float32)
        self.rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)

    async def embed(
        self, texts: Sequence[str], *, role: Role, truncate: Truncate, deadline: float | None
    ) -> EngineOutput:
        return EngineOutput(self.rows[: len(texts)], len(texts))

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...

    async def close(self) -> None: ...


@app.cls(image=image, max_containers=1, scaledown_window=600)
@modal.concurrent(max_inputs=64)
class VLLMEmbeddingSnapshot:
    """The methods of the product's class that are compared, and the container's clock."""

    @modal.enter()
    async def load(self) -> None:
        """Make the vectors."""
        self.service = EmbeddingService(RandomEngine())

    @modal.method()
    async def embed(self, sentences: list[str]) -> list[list[float]]:
        """As lists."""
        return await rpc.embed(self.service, sentences)

    @modal.method()
    async def embed_packed(self, request: dict[str, Any]) -> dict[str, Any]:
        """Packed."""
        return await rpc.embed_packed(self.service, request)

    @modal.method()
    async def describe(self) -> dict[str, Any]:
        """Who serves."""
        return rpc.describe(self.service, {})

    @modal.method()
    async def cpu(self) -> float:
        """Seconds of processor time that the container has used, all threads."""
        return time.process_time()


if __name__ == "__main__":
    raise SystemExit(f"python {Path(__file__).with_name('modal_rpc.py').name} runs this")
