"""Bearer keys: who may use the HTTP API."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from pydantic import SecretStr


class BearerKeys:
    """The valid keys. There may be several, so that they can be rotated.

    Args:
        keys: The valid keys. An empty list refuses every request; None accepts every request.
    """

    def __init__(self, keys: Sequence[SecretStr] | None) -> None:
        self._digests: list[bytes] | None = None
        if keys is not None:
            self.replace(keys)

    def replace(self, keys: Sequence[SecretStr]) -> None:
        """Accept these keys and no others. One secret may hold several keys, separated by white
        space."""
        # Digests have one length, so comparing them reveals nothing about the key.
        self._digests = [
            _digest(key.encode()) for secret in keys for key in secret.get_secret_value().split()
        ]

    def identify(self, authorization: str) -> str | None:
        """A name for the valid key in the value of an Authorization header, fit for logs: the
        beginning of its digest. None if there is no valid key."""
        if self._digests is None:
            return "without key"
        scheme, _, key = authorization.partition(" ")
        presented = _digest(key.strip().encode("latin-1"))  # as Starlette decodes headers
        # Every key is compared, so that the time does not reveal which one matches.
        matches = [hmac.compare_digest(presented, digest) for digest in self._digests]
        return presented.hex()[:8] if any(matches) and scheme.lower() == "bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
