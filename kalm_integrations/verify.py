"""No vector reaches a caller unchecked."""

from __future__ import annotations

from typing import Final

import numpy as np

from kalm_integrations.batching import Batch
from kalm_integrations.errors import IdentityMismatchError, InvalidResponseError
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.wire import EmbedAnswer, VectorDtype

NORM_TOLERANCE: Final = 2e-3
"""How far a length may be from 1: float16 rounds by up to 5e-4, an unnormalized vector is off by
far more."""


def verify(
    answer: EmbedAnswer,
    batch: Batch,
    *,
    dimensions: int,
    dtype: VectorDtype,
    expected: SpaceIdentity,
) -> None:
    """Check that `answer` is what was asked for `batch`.

    Raises:
        IdentityMismatchError: The vectors are of another space, or of an unknown one.
        InvalidResponseError: Wrong count, dimensions or type; a value that is not finite; a
            vector without unit length. The message names the caller's index.
    """
    check_identity(answer.identity, expected)
    vectors = answer.vectors
    if vectors.shape != (len(batch), dimensions) or vectors.dtype != dtype:
        raise InvalidResponseError(
            f"asked for {len(batch)} {dtype} vectors of {dimensions} dimensions, got "
            f"{vectors.dtype} of shape {vectors.shape}."
        )
    wide = vectors.astype(np.float32, copy=False)
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    # "not close" rather than "far": a comparison with NaN is false.
    wrong = np.flatnonzero(~(np.abs(lengths - 1.0) <= NORM_TOLERANCE))
    if wrong.size:
        row = int(wrong[0])
        what = (
            f"a vector of length {lengths[row]:.4f} instead of 1"
            if np.isfinite(wide[row]).all()
            else "values that are not finite"
        )
        more = f", and {wrong.size - 1} more texts got wrong vectors" if wrong.size > 1 else ""
        raise InvalidResponseError(f"texts[{batch.positions[row][0]}] got {what}{more}.")


def check_identity(served: SpaceIdentity | None, expected: SpaceIdentity) -> SpaceIdentity:
    """`served`, if it is the expected space.

    Raises:
        IdentityMismatchError: It is another one, or none.
    """
    if served is None:
        raise IdentityMismatchError("the service reports no identity.")
    if served != expected:
        raise IdentityMismatchError(
            f"expected {expected.model} ({expected.fingerprint}), but the service has "
            f"{served.model} ({served.fingerprint}): {expected.differences(served)}."
        )
    return served
