"""`kalm cost`."""

from __future__ import annotations

from typing import Annotated, Final

from cyclopts import Group, Parameter

from kalm_integrations.cli import console
from kalm_integrations.cli.failures import needs
from kalm_integrations.cli.parameters import (
    Count,
    ExistingPath,
    Gpus,
    Json,
    Share,
    TextColumn,
    between,
)
from kalm_integrations.cost import count_tokens, report, show
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.models import Quantization
from modal_backend.settings import WINDOWS

_CORPUS: Final = Group("A corpus, embedded at once")
_TRAFFIC: Final = Group("Queries, on a service that scales to zero")


def cost(
    *,
    gpu: Annotated[Gpus, Parameter(help="These GPUs only, with commas between them.")] = (),
    quantization: Annotated[Quantization | None, Parameter(help="This one only.")] = None,
    utilization: Annotated[
        Share, Parameter(help="Share of a container's billed time in which it computes.")
    ] = 0.6,
    tokens: Annotated[Count | None, Parameter(group=_CORPUS, help="Its tokens.")] = None,
    corpus: Annotated[
        ExistingPath | None,
        Parameter(group=_CORPUS, help="Count its tokens: a file or folder of kalm embed."),
    ] = None,
    text_column: Annotated[TextColumn, Parameter(group=_CORPUS)] = None,
    queries_per_day: Annotated[
        Count | None, Parameter(group=_TRAFFIC, help="On average, evenly spread.")
    ] = None,
    scaledown_window: Annotated[
        int | None,
        Parameter(
            group=_TRAFFIC,
            validator=between(*WINDOWS),
            help="Seconds that an idle container waits for the next call. Default: that of "
            "kalm deploy.",
        ),
    ] = None,
    cold_start: Annotated[
        int | None,
        Parameter(
            group=_TRAFFIC,
            validator=between(1, 3600),
            help="Seconds of a cold start. Default: those of docs/costs.md.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Print what each GPU costs."""
    if tokens is not None and corpus is not None:
        raise ConfigurationError("--corpus does not go with --tokens.")
    if corpus is not None:
        with needs("bulk"):
            tokens = count_tokens(corpus, text_column)
    elif text_column:
        raise ConfigurationError("--text-column goes with --corpus.")
    document = report(
        gpu,
        quantization=quantization,
        utilization=utilization,
        tokens=tokens,
        queries=queries_per_day,
        scaledown_window=scaledown_window,
        cold_start=cold_start,
    )
    if json:
        from kalm_integrations.cli.documents import CostReport

        console.print_document(CostReport.model_validate(document))
    else:
        show(document)
