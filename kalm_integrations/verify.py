"""Checks of answers: no vector reaches a caller unchecked."""

from __future__ import annotations

import logging
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.codec import EmbedAnswer, EmbedRequest
from kalm_integrations.errors import (
    CorruptedAnswerError,
    IdentityMismatchError,
    InvalidResponseError,
    InvalidText,
)
from kalm_integrations.floats import widen
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.options import ClientConfig

log = logging.getLogger(__name__)

NORM_TOLERANCE: Final = 2e-3
"""How far a length may be from 1: float16 rounds by up to 5e-4, an unnormalized vector is off by
far more."""
_LEAST, _MOST = (1 - NORM_TOLERANCE) ** 2, (1 + NORM_TOLERANCE) ** 2


class Verifier:
    """What the answers to one client must be. What the client does not know beforehand, the
    first answer sets for all others. May be used by several threads."""

    def __init__(self, settings: ClientConfig) -> None:
        self._settings = settings
        self._dimensions = settings.vector_dimensions
        self._seen: dict[None, SpaceIdentity] = {}  # one or none; setdefault is atomic
        self._warned = False
        self._unverified = False
        """Whether vectors without an identity were accepted."""

    def check_request(self, answer: EmbedAnswer, request: EmbedRequest) -> None:
        """Check that `answer` was made from `request`, as far as the service says.

        Raises:
            CorruptedAnswerError: It was made from another request.
        """
        if answer.digest is not None and answer.digest != request.digest():
            raise CorruptedAnswerError("the answer belongs to another request.")

    def check(self, answer: EmbedAnswer, rows: int) -> None:
        """Check that `answer` has the vectors that were requested.

        Args:
            answer: Of one request.
            rows: Number of its texts.

        Raises:
            IdentityMismatchError: The vectors are of another space, or of an unknown one.
            InvalidResponseError: Wrong count, dimensions or type; or, with their rows in
                `invalid`, vectors without unit length or with values that are not finite.
        """
        self.check_identity(answer.identity)
        if answer.identity is not None and self._unverified:
            raise IdentityMismatchError(
                f"the service changed from no identity to {_name(answer.identity)}."
            )
        vectors, dtype = answer.vectors, self._settings.vector_dtype
        dimensions = self._dimensions or vectors.shape[-1]
        if vectors.shape != (rows, dimensions) or vectors.dtype != dtype:
            raise InvalidResponseError(
                f"requested {rows} {dtype} vectors of {dimensions} dimensions, got "
                f"{vectors.dtype} of shape {vectors.shape}."
            )
        if wrong := wrong_rows(vectors):
            raise InvalidResponseError.of(wrong)
        self._dimensions = dimensions
        self._unverified = answer.identity is None

    def check_identity(self, served: SpaceIdentity | None) -> None:
        """Check what the service reports, None if it reports nothing.

        Raises:
            IdentityMismatchError: It is not what is expected, or not what it was before.
        """
        if not self._seen:
            self._check_first(served)
        before = self._seen.get(None) if served is None else self._seen.setdefault(None, served)
        if served is not before and served != before:
            differences = before.differences(served) if before and served else ""
            raise IdentityMismatchError(
                f"the service changed from {_name(before)} to {_name(served)}: {differences}."
            )

    def _check_first(self, served: SpaceIdentity | None) -> None:
        expected = self._settings.expected_space
        if served is None:
            if self._settings.expected_identity is not None:
                raise IdentityMismatchError(
                    f"expected {_name(expected)}, but the service reports no identity."
                )
            if not self._warned:
                self._warned = True
                log.warning(
                    "unverified: the service reports no identity; only the model's name, the "
                    "dimensions and the vectors' length are checked"
                )
        elif served.model != expected.model:
            raise IdentityMismatchError(
                f"expected {_name(expected)}, but the service has {_name(served)}: "
                f"model: {expected.model!r} != {served.model!r}."
            )
        elif expected.declared and served != expected:
            raise IdentityMismatchError(
                f"expected {_name(expected)}, but the service has {_name(served)}: "
                f"{expected.differences(served)}."
            )


def wrong_rows(vectors: NDArray[Any]) -> list[InvalidText]:
    """The rows that are no vectors of unit length, and what is wrong with each.

    Args:
        vectors: One a row, of any type of floats.
    """
    if not len(vectors):
        return []
    if len(vectors) == 1:  # a query's: each step costs more than its arithmetic
        row = vectors[0].astype(np.float32)
        if _LEAST <= np.vdot(row, row) <= _MOST:
            return []
    wide = widen(vectors)
    with np.errstate(all="ignore"):  # what overflows is wrong
        # Each row with itself: three times as fast as einsum.
        squares = np.matmul(wide[:, None, :], wide[:, :, None])
        if squares.min() >= _LEAST and squares.max() <= _MOST:  # false of NaN
            return []
        lengths = np.sqrt(squares[:, 0, 0])
    wrong = np.flatnonzero(~(np.abs(lengths - 1.0) <= NORM_TOLERANCE)).tolist()
    return [
        InvalidText(
            row,
            f"got a vector of length {lengths[row]:.4f} instead of 1"
            if np.isfinite(vectors[row]).all()
            else "got values that are not finite",
        )
        for row in wrong
    ]


def _name(space: SpaceIdentity | None) -> str:
    return "no identity" if space is None else f"{space.model} ({space.fingerprint})"
