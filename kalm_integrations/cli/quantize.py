"""`kalm quantize`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from kalm_integrations.cli.failures import needs
from kalm_integrations.models import KALM


def quantize(
    *,
    model: Annotated[
        str, Parameter(help="A folder, or a repository downloaded with `hf download`.")
    ] = KALM.space.model,
    revision: Annotated[
        str | None,
        Parameter(help="Commit of the repository. Default: the tested one, or main."),
    ] = None,
) -> None:
    """Write the int8 weights."""
    with needs("quantize"):
        from modal_backend.quantize import quantize

        quantize(model, revision)
