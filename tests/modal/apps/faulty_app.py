"""The real app with a faulty engine in it, so that a container finds its own vectors wrong.

The class, its life cycle and its endpoints are the product's; only the engine is not. The
container's variable FAULT names the fault when an engine is loaded:

always      all vectors have half their length
restored    the same, of an engine that went through the snapshot
load        it cannot be loaded
first-load  it cannot be loaded the first time
prepare     it cannot be loaded before the snapshot
missing     its weights are not there, before the snapshot
slow        before the snapshot, a load takes so long that the start has no time for another one
first-canary  vectors of the first engine have half their length
mixed-up    all vectors have their numbers in reverse order, of an engine that went through the
            snapshot; in other respects they are good
connection  it computes nothing until a peer at the port PEER has answered, over a connection that
            it opened when it was loaded
rows        the vectors of a call are in reverse order
texts       as its texts say: one with "slow" waits for the file GATE, one with "refused" is refused
            as only a model can, one with "poison" breaks the engine's call
"""

import asyncio
import os
import socket
from dataclasses import replace
from typing import Any

import modal

import modal_backend.app as product
from kalm_integrations.bulk.on_modal import worker_pool
from kalm_integrations.errors import EngineLoadError, InvalidInputError, InvalidText
from modal_backend import lifecycle
from modal_backend.engines import registry
from modal_backend.engines.base import Engine, EngineOutput
from modal_backend.settings import DeploySettings

lifecycle.REPLACEMENT_DELAY = 3.0
SLOW = 1.5
loads = 0
EMBEDDED = registry.ENGINES["embedded"]

if os.environ.get("FAULT") == "slow":
    DeploySettings.attempt_timeout = 1.0  # a start has time for two of these
if mode := os.environ.get("CANARY"):
    product.settings = product.settings.model_copy(update={"canary": mode})


class FaultyEngine:
    def __init__(self, engine: Engine, fault: str) -> None:
        self._engine = engine
        self._wrong = fault == "always" or (fault == "first-canary" and loads == 1)
        self._mixed_up = False
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
        vectors = output.vectors[:, ::-1] if self._mixed_up else output.vectors
        vectors = vectors[::-1] if self._fault == "rows" else vectors
        return EngineOutput(vectors / 2 if self._wrong else vectors, output.tokens)

    async def wake(self) -> None:
        self._wrong = self._fault == "restored"
        self._mixed_up = self._fault == "mixed-up"

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


async def load_faulty(options: registry.Options) -> FaultyEngine:
    global loads
    loads += 1
    fault = os.environ.get("FAULT", "")
    # The variables of a container are read again after its restore.
    if fault in ("load", "prepare") or (fault == "first-load" and loads == 1):
        raise OSError("the disk is gone")
    if fault == "missing":
        error = EngineLoadError("the weights are not on this machine.")
        error.permanent = True
        raise error
    if fault == "slow":
        await asyncio.sleep(SLOW)
        raise TimeoutError("not ready")
    return FaultyEngine(await EMBEDDED.load(options), fault)


registry.ENGINES["embedded"] = replace(EMBEDDED, load=load_faulty)
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
    volumes={worker_pool.VOLUME: product.bulk_volume},
    scaledown_window=60,
    startup_timeout=60,
    retries=modal.Retries(max_retries=10, initial_delay=1.0),
    enable_memory_snapshot=True,
)
@modal.concurrent(max_inputs=2, target_inputs=1)
class VLLMBulkEmbedding(product.VLLMBulkEmbedding._get_user_cls()):
    """The same."""
