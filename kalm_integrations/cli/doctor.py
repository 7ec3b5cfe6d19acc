"""`kalm doctor`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from kalm_integrations.cli.parameters import Json


def doctor(
    *,
    wake: Annotated[
        bool,
        Parameter(help="Ask the service for vectors, even where that starts a paid container."),
    ] = False,
    reference: Annotated[
        bool,
        Parameter(help="--wake, and compare KaLM's vectors with published ones."),
    ] = False,
    golden: Annotated[bool, Parameter(show=False)] = False,
    json: Json = False,
) -> bool:
    """Run the checks; return whether none failed."""
    from kalm_integrations.doctor import run

    return run(wake=wake, reference=reference or golden, as_json=json)
