"""`kalm eval`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter, Token

from kalm_integrations.cli.failures import needs
from kalm_integrations.cli.parameters import ExistingPath, Json, TextColumn, between


def _ranks(_: type, tokens: Sequence[Token]) -> tuple[int, ...]:
    value = tokens[-1].value
    parts = value.split(",")
    if not all(part.strip().isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError(f"{value!r} is not whole numbers of at least 1, like 1,10,100")
    return tuple(map(int, parts))


def _deployment(role: str) -> Any:
    return Parameter(help=f"The deployment {role}: a URL, or the name of an app on Modal.")


def quantization(
    *,
    baseline: Annotated[str, _deployment("whose rankings are the reference")],
    candidate: Annotated[str, _deployment("to compare with it")],
    corpus: Annotated[
        ExistingPath,
        Parameter(
            help="JSON Lines (*.jsonl), plain text with one text a line (*.txt), or a folder of "
            "Markdown, reStructuredText and text files."
        ),
    ],
    queries: Annotated[
        ExistingPath | None,
        Parameter(help="The same, of queries. Default: first sentences of the corpus."),
    ] = None,
    text_column: TextColumn = None,
    sample: Annotated[
        int,
        Parameter(
            validator=between(2),
            help="Most documents, and most queries; always the same ones.",
        ),
    ] = 2000,
    k: Annotated[
        tuple[int, ...] | None,
        Parameter(
            converter=_ranks,
            n_tokens=1,
            help="How many hits to compare, and 1. Default: those of 1,10,100 that the corpus is "
            "large enough for.",
        ),
    ] = None,
    dimensions: Annotated[
        int | None,
        Parameter(
            validator=between(1),
            help="Dimensions of all vectors. Default: KALM_DIMENSIONS, or the model's native "
            "number.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Compare the rankings of two deployments."""
    with needs("quickstart"):  # for a folder of documents
        from kalm_integrations.evaluation.quantization import Asked, run

        run(
            Asked(
                baseline=baseline,
                candidate=candidate,
                corpus=corpus,
                queries=queries,
                text_column=text_column,
                sample=sample,
                ks=k,
                dimensions=dimensions,
                as_json=json,
            )
        )
