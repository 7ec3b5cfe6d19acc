"""How much work may wait: a bounded queue, so that overload is an answer and not a pile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kalm_integrations.errors import ServiceUnavailableError
from kalm_integrations.prompts import Role

MAX_WAITING: Final[dict[Role, int]] = {"query": 1024, "document": 16_384}
"""Most texts that are in the service, by role: bulk that fills its share leaves queries theirs."""
RETRY_AFTER: Final = 2.0


class Admission:
    """Counts the texts that are in the service, waiting or computed."""

    def __init__(self, limits: dict[Role, int] | None = None) -> None:
        self._limits = limits or MAX_WAITING
        self.inside: dict[Role, int] = {"query": 0, "document": 0}

    @contextmanager
    def admit(self, role: Role, texts: int) -> Iterator[None]:
        """Count `texts` in while the block runs.

        Raises:
            ServiceUnavailableError: There is no room; says when to come back.
        """
        # A service that holds nothing takes any request that its other limits allow.
        if self.inside[role] and self.inside[role] + texts > self._limits[role]:
            raise ServiceUnavailableError(
                f"{self.inside[role]:,} {role} texts are waiting already.", retry_after=RETRY_AFTER
            )
        self.inside[role] += texts
        try:
            yield
        finally:
            self.inside[role] -= texts
