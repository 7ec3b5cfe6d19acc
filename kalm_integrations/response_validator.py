"""The client's check of every response: the requested vectors, of the expected space."""

from __future__ import annotations

import logging

from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import (
    CorruptedAnswerError,
    IdentityMismatchError,
    InvalidResponseError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.protocol import EmbedRequest, EmbedResponse
from kalm_integrations.validation import invalid_rows

log = logging.getLogger(__name__)


class ResponseValidator:
    """Checks every response to one client, on one event loop. What the client does not know
    (dimensions, identity) is set by the first response."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._dimensions = config.vector_dimensions
        self._identity: SpaceIdentity | None = None
        self._warned = False
        self._unverified = False
        """Whether vectors without an identity were accepted."""

    def check(self, response: EmbedResponse, request: EmbedRequest) -> None:
        """Check that `response` holds the vectors of `request`.

        Raises:
            CorruptedAnswerError: It belongs to another request.
            IdentityMismatchError: The vectors are of another space, or of an unknown one.
            InvalidResponseError: Wrong count, dimensions or type; or, with their rows in
                `invalid`, vectors that are not finite or not of unit length.
        """
        if response.digest is not None and response.digest != request.digest():
            raise CorruptedAnswerError("the response belongs to another request.")
        self.check_identity(response.identity)
        if response.identity is not None and self._unverified:
            raise IdentityMismatchError(
                f"the service changed from no identity to {_name(response.identity)}."
            )
        vectors, count, dtype = response.vectors, len(request.texts), self._config.vector_dtype
        dimensions = self._dimensions or vectors.shape[-1]
        if vectors.shape != (count, dimensions) or vectors.dtype != dtype:
            raise InvalidResponseError(
                f"requested {count} {dtype} vectors of {dimensions} dimensions, got "
                f"{vectors.dtype} of shape {vectors.shape}."
            )
        if invalid := invalid_rows(vectors):
            raise InvalidResponseError.of(invalid)
        self._dimensions = dimensions
        self._unverified = response.identity is None

    def check_identity(self, served: SpaceIdentity | None) -> None:
        """Check the identity that the service reports; None if it reports none.

        Raises:
            IdentityMismatchError: It is not the expected one, or has changed.
        """
        if self._identity is None:
            self._check_first(served)
            self._identity = served
        elif served is None:
            raise IdentityMismatchError(
                f"the service changed from {_name(self._identity)} to no identity."
            )
        elif served is not self._identity and served != self._identity:
            raise IdentityMismatchError(
                f"the service changed from {_name(self._identity)} to {_name(served)}: "
                f"{self._identity.differences(served)}."
            )

    def _check_first(self, served: SpaceIdentity | None) -> None:
        expected = self._config.expected_space
        if served is not None:
            if served != expected if expected.declared else served.model != expected.model:
                raise IdentityMismatchError(
                    f"expected {_name(expected)}, but the service has {_name(served)}: "
                    f"{expected.differences(served)}."
                )
        elif self._config.expected_identity is not None:
            raise IdentityMismatchError(
                f"expected {_name(expected)}, but the service reports no identity."
            )
        elif not self._warned:
            self._warned = True
            log.warning(
                "unverified: the service reports no identity; only the model's name, the "
                "dimensions and the vectors' length are checked"
            )


def _name(space: SpaceIdentity) -> str:
    return f"{space.model} (space {space.fingerprint})"
