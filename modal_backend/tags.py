"""Tags of the Modal app: they describe a deployment without starting a container."""

from __future__ import annotations

from typing import Final

from kalm_integrations.models import PROFILES, in_fp8
from kalm_integrations.version import __version__
from modal_backend.settings import DeploySettings

VERSION_TAG: Final = "kalm-version"
IDENTITY_TAG: Final = "kalm-identity"
BULK_TAG: Final = "kalm-bulk"
DEPLOYABLE: Final = {
    profile.space.fingerprint: profile.space
    for known in PROFILES
    for profile in (known, in_fp8(known))
}
"""Spaces of known models, by what `kalm deploy` writes into the identity tag."""


def tags_of(settings: DeploySettings) -> dict[str, str]:
    """This version, the space that the deployment should serve, and the Volume of bulk jobs."""
    return {
        VERSION_TAG: __version__,
        IDENTITY_TAG: settings.space.fingerprint,
        BULK_TAG: settings.bulk_volume,
    }
