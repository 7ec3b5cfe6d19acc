"""`kalm deploy`: every setting of the deployment is an option."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Group, Parameter

from kalm_integrations.cli.failures import needs
from modal_backend.settings import DeploySettings


def deploy(
    *,
    settings: Annotated[
        DeploySettings | None,
        Parameter(name="*", group=Group("Settings"), negative_bool="no-"),
    ] = None,
    accept_new_identity: Annotated[
        bool,
        Parameter(
            help="Replace a deployment of another vector space: its indexes must be embedded again."
        ),
    ] = False,
) -> None:
    """Deploy the service to Modal."""
    with needs("modal"):
        from modal_backend.deploy import deploy

        deploy(settings or DeploySettings(), accept_new_identity=accept_new_identity)
