"""The real app with a faulty engine in it, so that a container finds its own vectors wrong.

The class, its life and its doors are the product's; only what `_load` gives is not. What is wrong
is said by the container's variable FAULT when an engine is loaded:

always      all vectors have half their length
restored    the same, of an engine that went through the snapshot
load        it cannot be loaded
connection  it computes nothing until a peer at the port PEER has answered, over a connection that
            it opened when it was loaded
texts       as its texts say: one with "slow" waits for the file GATE, one with "refused" is refused
            as only a model can, one with "poison" breaks the engine's call
"""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import modal

import modal_backend.app as product
from kalm_integrations.bulk.on_modal import pool
from kalm_integrations.errors import InvalidInputError, InvalidText
from modal_backend import lifecycle
from modal_backend.engines import Engine, EngineOutput

lifecycle.REPLACED_AFTER = 5.0
load_real: Callable[[], Awaitable[Engine]] = product._load


class FaultyEngine:
    def __init__(self, engine: Engine, fault: str) -> None:
        self._engine = engine
        self._wrong = fault == "always"
        self._fault = fault
        self._peer: socket.socket | None = None
        if fault == "connection":
            self._peer = socket.create_connection(("127.0.0.1", int(os.environ["PEER"])))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def embed(self, *args: Any, **options: Any) -> EngineOutput:
        if self._peer is not None:
            self._peer.sendall(b"?")
            if self._peer.recv(1) != b"!":
                raise ConnectionError("the peer has hung up")
        if self._fault == "texts":
            await act_on(args[0])
        output = await self._engine.embed(*args, **options)
        return EngineOutput(output.vectors / 2, output.tokens) if self._wrong else output

    async def wake(self) -> None:
        self._wrong = self._fault == "restored"

    async def close(self) -> None:
        if self._peer is not None:
            self._peer.close()
        await self._engine.close()


async def act_on(texts: list[str]) -> None:
    while any("slow" in text for text in texts) and not os.access(os.environ["GATE"], os.F_OK):
        await asyncio.sleep(0.02)
    refused = [InvalidText(n, "is refused") for n, text in enumerate(texts) if "refused" in text]
    if refused:
        raise InvalidInputError.of(refused)
    if any("poison" in text for text in texts):
        raise RuntimeError("the engine choked")


async def load_faulty() -> FaultyEngine:
    fault = os.environ.get("FAULT", "")
    if fault == "load":
        raise OSError("the disk is gone")
    return FaultyEngine(await load_real(), fault)


product._load = load_faulty
app = modal.App(product.settings.app_name, tags=product.tags_of(product.settings))


@app.cls(
    image=product.image,
    secrets=product.api_key_secrets,
    max_containers=1,
    scaledown_window=60,
    timeout=60,
    startup_timeout=60,
    enable_memory_snapshot=True,
)
@modal.concurrent(max_inputs=product.settings.concurrency)
class VLLMEmbeddingSnapshot(product.VLLMEmbeddingSnapshot._get_user_cls()):
    """Defined here, so that containers import this module."""


@app.cls(
    image=product.image,
    volumes={pool.VOLUME: product.bulk_volume},
    scaledown_window=60,
    startup_timeout=60,
    retries=modal.Retries(max_retries=10, initial_delay=1.0),
    enable_memory_snapshot=True,
)
@modal.concurrent(max_inputs=2, target_inputs=1)
class VLLMBulkEmbedding(product.VLLMBulkEmbedding._get_user_cls()):
    """The same."""
