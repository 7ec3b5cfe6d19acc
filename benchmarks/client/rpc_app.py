"""The app that `rpc.py` measures: the real RPC endpoint over an engine that costs nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import modal
from instant import InstantEngine

from modal_backend import rpc
from modal_backend.service import EmbeddingService

app = modal.App("rpc-benchmark")
image = modal.Image.debian_slim().add_local_python_source(
    "instant", "kalm_integrations", "modal_backend"
)


@app.cls(image=image, max_containers=1, scaledown_window=600)
@modal.concurrent(max_inputs=64)
class VLLMEmbeddingSnapshot:
    """The methods of the product's class that are compared, and the container's clock."""

    @modal.enter()
    async def load(self) -> None:
        """Make the vectors."""
        self.service = EmbeddingService(InstantEngine())

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
    raise SystemExit(f"python {Path(__file__).with_name('rpc.py').name} runs this")
