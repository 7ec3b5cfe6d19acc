"""`kalm cost`."""

from __future__ import annotations

import sys
from typing import Annotated, Final

from cyclopts import Group, Parameter

from kalm_integrations.cli.parameters import (
    Count,
    ExistingPath,
    Gpus,
    Json,
    Quantization,
    Share,
    TextColumn,
    between,
)
from kalm_integrations.cost import corpus as corpora
from kalm_integrations.cost import report
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.lines import check_column
from modal_backend import costs
from modal_backend.settings import WINDOWS, DeploySettings

_CORPUS: Final = Group("A corpus, embedded at once")
_TRAFFIC: Final = Group("Queries, on a service that scales to zero")
_UTILIZATION: Final = 0.6


def cost(
    *,
    gpu: Annotated[Gpus, Parameter(help="These GPUs only, with commas between them.")] = (),
    quantization: Annotated[Quantization | None, Parameter(help="This one only.")] = None,
    utilization: Annotated[
        Share,
        Parameter(
            help="Share of a container's paid time in which it computes, for the second price of "
            "a million tokens."
        ),
    ] = _UTILIZATION,
    tokens: Annotated[Count | None, Parameter(group=_CORPUS, help="Its tokens.")] = None,
    corpus: Annotated[
        ExistingPath | None,
        Parameter(
            group=_CORPUS,
            help="JSON Lines (*.jsonl), any other text file, or a folder of Markdown, "
            "reStructuredText and text files.",
        ),
    ] = None,
    texts: Annotated[
        Count | None, Parameter(group=_CORPUS, help="Its texts, with --tokens-per-text.")
    ] = None,
    tokens_per_text: Annotated[
        Count | None, Parameter(group=_CORPUS, help="Tokens of each text, with --texts.")
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
            help="Seconds of a cold start. Default: the calculated budget of docs/costs.md.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Print what each GPU costs."""
    sources = {"--tokens": tokens, "--corpus": corpus, "--texts": texts}
    given = [option for option, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ConfigurationError(f"{given[1]} does not go with {given[0]}.")
    if (texts is None) != (tokens_per_text is None):
        raise ConfigurationError("--texts and --tokens-per-text go together.")
    check_column(text_column, corpus)
    for option, value in {"scaledown-window": scaledown_window, "cold-start": cold_start}.items():
        if value is not None and not (given or queries_per_day):
            raise ConfigurationError(f"--{option} is for --queries-per-day, or for a corpus.")
    try:
        choices = costs.choices(gpu, quantization)
    except ValueError as error:
        raise ConfigurationError(f"--{error}.") from error
    counted = None
    if corpus is not None:
        counted = corpora.of_files(corpus, text_column)
    elif texts is not None and tokens_per_text is not None:
        counted = corpora.of_texts(texts, tokens_per_text)
    elif tokens is not None:
        counted = corpora.of_tokens(tokens)
    asked = report.Asked(
        corpus=counted,
        queries_per_day=queries_per_day,
        window=scaledown_window or DeploySettings.model_fields["scaledown_window"].default,
        start=cold_start,
        utilization=utilization,
    )
    shown = report.document if json else report.text
    sys.stdout.write(shown(choices, asked) + "\n")
