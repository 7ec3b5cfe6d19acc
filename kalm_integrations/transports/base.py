"""The protocol of all transports.

docs/architecture.md lists what to change to add one.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol, assert_never, runtime_checkable

from kalm_integrations.protocol import EmbedRequest, EmbedResponse, ServiceDescription

if TYPE_CHECKING:
    from kalm_integrations.config import ClientConfig

log = logging.getLogger(__name__)


@runtime_checkable
class Transport(Protocol):
    """Sends one request and translates the response.

    It neither retries nor validates vectors: the session does. It raises `KalmError`s, with indices
    within the request. It runs on one event loop, and opens nothing before the first call.

    It may also have `async def count_tokens(self, request: EmbedRequest) -> list[int]`, for
    `KalmClient.count_tokens`.
    """

    @property
    def can_be_cold(self) -> bool:
        """Whether a late first response may mean that the service is still starting."""
        ...

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        """Send one request."""
        ...

    async def ensure_ready(self) -> ServiceDescription | None:
        """Wait until the service can embed; None if it could not be identified."""
        ...

    async def close(self) -> None:
        """Close the connections. A later call may open new ones."""
        ...


def open_transport(config: ClientConfig) -> Transport:
    """The transport in `config`, or the one that its backend names."""
    backend = config.resolved_backend
    if config.lacks_instruction:
        log.warning(
            "%r is no model that this package knows: queries get no instruction. If it is another "
            'name of one, pass it as profile= ("kalm"); otherwise pass query_instruction=.',
            config.served_model,
        )
    if backend == "transport":
        assert config.transport is not None
        return config.transport
    if backend == "modal":
        from kalm_integrations.transports.modal import ModalTransport

        return ModalTransport(config)
    if backend == "http" and config.base_url is None:
        from kalm_integrations.transports.modal import ModalHttpTransport

        return ModalHttpTransport(config)
    if backend == "http":
        from kalm_integrations.transports.http import HttpTransport

        if len(config.base_urls) == 1:
            return HttpTransport(config)
        from kalm_integrations.transports.failover import FailoverTransport

        servers = {url: HttpTransport(config, url) for url in config.base_urls}
        return FailoverTransport(servers, hedge=config.hedge)
    if backend == "local":
        from kalm_integrations.transports.in_process import InProcessTransport

        return InProcessTransport()
    assert_never(backend)


async def describe_service(config: ClientConfig) -> ServiceDescription:
    """What the service reports about itself, unchecked. On the background loop only."""
    transport = open_transport(config)
    try:
        return await transport.ensure_ready() or ServiceDescription(identity=None)
    finally:
        await transport.close()
