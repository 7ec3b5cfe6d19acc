"""Doors to a service: one protocol, one module each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kalm_integrations.codec import EmbedAnswer, EmbedRequest, ServiceWarning
from kalm_integrations.identity import SpaceIdentity

if TYPE_CHECKING:
    from kalm_integrations.options import ClientConfig


@runtime_checkable
class Transport(Protocol):
    """A way to a service. Used on one loop only; opens nothing before the first call.

    A transport sends one request and translates what comes back. It neither retries nor checks
    vectors. It raises `KalmError`s, with indices counted within the request.

    Attributes:
        may_be_cold: Whether a late first answer may be that of a service that starts.
        may_rest: Whether its loop may stand still between calls.
        reports_no_identity: Whether the service is known to report none: what `wake` returned as
            None is then its answer, and not a failed probe.
        service_warnings: What the service reported at the last `wake`.
    """

    may_be_cold: bool
    may_rest: bool

    @property
    def service_warnings(self) -> tuple[ServiceWarning, ...]: ...

    @property
    def reports_no_identity(self) -> bool: ...

    async def embed(self, request: EmbedRequest) -> EmbedAnswer:
        """Send one request."""
        ...

    async def wake(self) -> SpaceIdentity | None:
        """Have the service ready to answer; returns its identity, if it reports one."""
        ...

    async def close(self) -> None:
        """Close connections. The transport is not used afterwards."""
        ...


def open_transport(settings: ClientConfig) -> Transport:
    """The transport that `settings` hold, or that their backend names."""
    if settings.transport is not None:
        return settings.transport
    if settings.resolved_backend == "modal":
        from kalm_integrations.transports.modal import ModalTransport

        return ModalTransport(settings)
    if settings.resolved_backend == "http" and settings.base_url is None:
        from kalm_integrations.transports.modal import DiscoveredHttpTransport

        return DiscoveredHttpTransport(settings)
    if settings.resolved_backend == "http":
        from kalm_integrations.transports.http import HttpTransport

        return HttpTransport(settings)
    from kalm_integrations.transports.in_process import InProcessTransport

    return InProcessTransport()


async def reported(
    settings: ClientConfig,
) -> tuple[SpaceIdentity | None, tuple[ServiceWarning, ...]]:
    """The identity that the service reports, compared with nothing, and its warnings. On the I/O
    thread only."""
    transport = open_transport(settings)
    try:
        return await transport.wake(), transport.service_warnings
    finally:
        await transport.close()
