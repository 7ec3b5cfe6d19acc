"""`modal run -m modal_backend.app`: the doctor's checks, of the deployment of these settings."""

from __future__ import annotations

from kalm_integrations.cli.doctor import run
from kalm_integrations.doctor.base import DoctorContext
from modal_backend.settings import DeploySettings


def check_deployment(settings: DeploySettings) -> None:
    """Start the deployed class, check it over RPC, and print what was found.

    Args:
        settings: Name the app, and the engine whose identity is expected.

    Raises:
        SystemExit: A check failed.
    """
    arguments = {"backend": "modal", "app_name": settings.app_name, **settings.client_arguments}
    if not run(DoctorContext(wake=True, reference=True, arguments=arguments)):
        raise SystemExit(1)
