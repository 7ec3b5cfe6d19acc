"""`kalm eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

from cyclopts import Parameter, Token

from kalm_integrations.cli.failures import needs
from kalm_integrations.cli.parameters import ExistingPath, Json, TextColumn, between

_SYSTEM: Final = (
    'A URL, the name of an app on Modal, or "local". Arguments of the client may follow, as in '
    '"https://api.openai.com/v1 model=text-embedding-3-small api_key_variable=OPENAI_API_KEY".'
)


def _numbers(_: type, tokens: Sequence[Token]) -> tuple[int, ...]:
    value = tokens[-1].value
    parts = value.split(",")
    if not all(part.strip().isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError(f"{value!r} is not whole numbers of at least 1, like 1,10,100")
    return tuple(map(int, parts))


Numbers = Annotated[tuple[int, ...], Parameter(converter=_numbers, n_tokens=1)]
Plot = Annotated[Path | None, Parameter(help="Draw the figures into this file.")]


def retrieval(
    folder: Annotated[
        ExistingPath,
        Parameter(help="In BEIR's format: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv."),
    ],
    /,
    *,
    system: Annotated[
        tuple[str, ...],
        Parameter(
            consume_multiple=False,
            help=f"{_SYSTEM} May be repeated; the first one is the baseline. Default: the KALM_* "
            "variables.",
        ),
    ] = (),
    dimensions: Annotated[Numbers, Parameter(help="Of each system, like 512,1024.")] = (),
    query_instruction: Annotated[
        tuple[str, ...],
        Parameter(
            consume_multiple=False, help="A preset or task, for each system. May be repeated."
        ),
    ] = (),
    split: Annotated[str, Parameter(help="Of the relevance judgments.")] = "test",
    k: Annotated[Numbers, Parameter(help="Numbers of results.")] = (10, 100),
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Measure nDCG, recall and MRR on texts with relevance judgments."""
    with needs("eval"):
        from kalm_integrations.evaluation.retrieval import run

        run(
            folder,
            systems=system,
            dimensions=dimensions,
            query_instructions=query_instruction,
            split=split,
            k=k,
            plot_path=plot,
            as_json=json,
        )


def compare(
    baseline: Annotated[str, Parameter(name="A", help=_SYSTEM)],
    candidate: Annotated[str, Parameter(name="B", help="The other one.")],
    /,
    *,
    corpus: Annotated[ExistingPath, Parameter(help="Documents: a file or folder of kalm embed.")],
    queries: Annotated[
        ExistingPath | None, Parameter(help="The same, of queries. Default: the documents.")
    ] = None,
    text_column: TextColumn = None,
    sample: Annotated[
        int, Parameter(validator=between(3), help="Most documents, and most queries.")
    ] = 2000,
    k: Annotated[Numbers, Parameter(help="Numbers of results.")] = (1, 10, 100),
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Tell how far two systems find the same, without relevance judgments."""
    with needs("eval"):
        from kalm_integrations.evaluation.compare import run

        run(
            (baseline, candidate),
            corpus=corpus,
            queries_path=queries,
            text_column=text_column,
            sample=sample,
            k=k,
            plot_path=plot,
            as_json=json,
        )
