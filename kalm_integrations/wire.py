"""What travels between a client and a service, whichever door it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.prompts import Role
from kalm_integrations.result import Usage

Truncate = Literal["error", "end"]
VectorDtype = Literal["float16", "float32"]
Vectors = NDArray[np.floating[Any]]
"""Shape (texts, dimensions), float16 or float32, one unit vector a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """One request.

    Attributes:
        texts: The texts as the model shall see them, instructions set in.
        role: Queries go before documents in the engine.
        dimensions: Asked for, or None for the model's own.
        truncate: What to do with a text over the model's length.
        dtype: Type of the answer's vectors.
        timeout: Seconds that the caller still waits: what has not started by then is dropped.
    """

    texts: list[str]
    role: Role
    dimensions: int | None = None
    truncate: Truncate = "error"
    dtype: VectorDtype = "float16"
    timeout: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedAnswer:
    """One answer: `vectors[i]` is of `request.texts[i]`.

    `identity` is None only for a service that reports none.
    """

    vectors: Vectors
    identity: SpaceIdentity | None
    usage: Usage
