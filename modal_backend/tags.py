"""What a deployment says of itself without a container: Modal keeps tags with the app."""

from __future__ import annotations

from typing import Final

from kalm_integrations.models import EMBEDDED, KALM_MINI, NAMED_SPACES
from kalm_integrations.version import __version__
from modal_backend.settings import DeploySettings

VERSION_TAG: Final = "kalm-version"
IDENTITY_TAG: Final = "kalm-identity"
BULK_TAG: Final = "kalm-bulk"
DEPLOYABLE: Final = {
    space.fingerprint: space for space in (EMBEDDED.space, KALM_MINI.space, *NAMED_SPACES.values())
}
"""What `kalm deploy` of this version writes into the identity tag for the models that it knows."""


def tags_of(settings: DeploySettings) -> dict[str, str]:
    """Our version, the space that this deployment is meant to serve, and the bulk jobs' Volume."""
    return {
        VERSION_TAG: __version__,
        IDENTITY_TAG: settings.space.fingerprint,
        BULK_TAG: settings.bulk_volume,
    }
