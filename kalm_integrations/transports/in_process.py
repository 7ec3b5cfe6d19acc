"""backend="local": the service with the embedded engine, in this process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from kalm_integrations.codec import EmbedAnswer, EmbedRequest
from kalm_integrations.event_loop import io_thread
from kalm_integrations.identity import SpaceIdentity

if TYPE_CHECKING:
    from modal_backend.service import EmbeddingService

_services: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[EmbeddingService]] = (
    WeakKeyDictionary()
)


class InProcessTransport:
    """All clients of a process share one service, and so one copy of the weights."""

    may_be_cold = False
    may_rest = False
    reports_no_identity = False
    service_warnings = ()

    async def embed(self, request: EmbedRequest) -> EmbedAnswer:
        return await (await _service()).embed(request)

    async def wake(self) -> SpaceIdentity | None:
        return (await _service()).identity

    async def close(self) -> None:
        """Nothing: other clients may share the service."""


async def _service() -> EmbeddingService:
    loop = asyncio.get_running_loop()
    loading = _services.get(loop)
    if loading is None or (loading.done() and loading.exception()):  # failed: try afresh
        loading = _services[loop] = asyncio.create_task(_load())
    # Shielded: one caller's deadline must not end the loading for all.
    return await asyncio.shield(loading)


async def _load() -> EmbeddingService:
    from modal_backend.engines.compute_thread import ComputeThread
    from modal_backend.engines.embedded import EmbeddedEngine
    from modal_backend.service import EmbeddingService

    loader = ComputeThread("kalm-loader")
    try:
        service = EmbeddingService(await loader.run(EmbeddedEngine.load))
    finally:
        loader.stop()
    io_thread().resources.add(service)
    return service
