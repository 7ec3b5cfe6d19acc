"""`kalm completion`."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from cyclopts import Parameter


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], Parameter(help="Which shell.")], /
) -> None:
    """Print the completion script."""
    from kalm_integrations.cli import build_app

    sys.stdout.write(build_app().generate_completion(shell=shell))
