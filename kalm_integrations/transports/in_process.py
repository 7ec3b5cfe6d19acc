"""backend="local": the service with the embedded engine, in this process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from kalm_integrations import tracing
from kalm_integrations.event_loop import background_loop
from kalm_integrations.protocol import EmbedRequest, EmbedResponse, ServiceDescription

if TYPE_CHECKING:
    from modal_backend.service import EmbeddingService

_services: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[EmbeddingService]] = (
    WeakKeyDictionary()
)


class InProcessTransport:
    """Calls a service in this process.

    Args:
        service: The service, on this event loop; None for that of the embedded engine, which all
            clients of a process share.
    """

    can_be_cold = False

    def __init__(self, service: EmbeddingService | None = None) -> None:
        self._service = service

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        service = self._service or await _embedded_service()
        with tracing.server_span():
            return await service.embed(request)

    async def count_tokens(self, request: EmbedRequest) -> list[int]:
        return await (self._service or await _embedded_service()).count_tokens(request)

    async def ensure_ready(self) -> ServiceDescription:
        return ServiceDescription((self._service or await _embedded_service()).identity)

    async def close(self) -> None:
        """Nothing: the service is shared."""


async def _embedded_service() -> EmbeddingService:
    loop = asyncio.get_running_loop()
    loading = _services.get(loop)
    if loading is None or (loading.done() and loading.exception()):  # failed: load again
        loading = _services[loop] = asyncio.create_task(_load())
    # Shielded: one caller's deadline must not cancel the loading for all.
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
    background_loop().resources.add(service)
    return service
