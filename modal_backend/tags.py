"""Tags of the Modal app, which describe a deployment without starting a container."""

from __future__ import annotations

from typing import Final

from kalm_integrations.models import PROFILES, SCHEMES, quantized
from kalm_integrations.version import __version__
from modal_backend.engines.registry import ENGINES
from modal_backend.settings import DeploySettings

VERSION_TAG: Final = "kalm-version"
IDENTITY_TAG: Final = "kalm-identity"
BULK_TAG: Final = "kalm-bulk"
_CPU_MODELS: Final = [engine.profile for engine in ENGINES.values() if engine.profile is not None]
_QUANTIZED: Final = [
    quantized(profile, kind)
    for profile in PROFILES
    if profile not in _CPU_MODELS
    for kind in SCHEMES
]
DEPLOYABLE: Final = {
    profile.space.fingerprint: profile.space for profile in (*PROFILES, *_QUANTIZED)
}
"""The spaces of known models, by the value of the identity tag."""


def tags_of(settings: DeploySettings) -> dict[str, str]:
    """Return this version, the expected space and the Volume of bulk jobs."""
    return {
        VERSION_TAG: __version__,
        IDENTITY_TAG: settings.space.fingerprint,
        BULK_TAG: settings.bulk_volume,
    }
