"""`kalm eval quantization`: does another quantization find the same, on the user's own texts?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import ConfigurationError, KalmError
from kalm_integrations.evaluation import agreement, report, texts
from kalm_integrations.evaluation.agreement import Vectored
from kalm_integrations.evaluation.deployments import Deployment, connect, may_sleep
from kalm_integrations.evaluation.report import Comparison
from kalm_integrations.evaluation.texts import Texts
from kalm_integrations.lines import check_column
from kalm_integrations.progress import progress_bar
from kalm_integrations.terminal import wrapped, write

USUAL_KS: Final = (1, 10, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be compared, and on what; `kalm eval quantization --help` explains each."""

    baseline: str
    candidate: str
    corpus: Path
    queries: Path | None
    text_column: str | None
    sample: int
    ks: tuple[int, ...] | None
    dimensions: int | None
    as_json: bool


def run(asked: Asked) -> bool:
    """Embed the user's texts with both deployments, compare, and print what was found.

    Args:
        asked: What to compare.

    Returns:
        True: there is no figure that would be wrong.

    Raises:
        ConfigurationError: The texts or the arguments cannot work; nothing was embedded, unless
            only the model could tell.
        KalmError: A deployment failed; the message says which.
    """
    documents, queries, own = _read(asked)
    ks = _ks(asked.ks, len(documents) - (own is not None), own is not None)
    if cost := _cost(asked):
        write(wrapped(cost), sys.stderr)
    sides = connect(asked.baseline, asked.candidate, asked.dimensions)
    try:
        dimensions = _probed(sides, queries)
        baseline, candidate = _embedded(sides, documents, queries)
    finally:
        for side in sides:
            side.close()
    comparison = Comparison(
        sides=sides,
        dimensions=dimensions,
        documents=documents,
        queries=queries,
        derived=own is not None,
        document_cosines=agreement.cosines(baseline.documents, candidate.documents),
        query_cosines=agreement.cosines(baseline.queries, candidate.queries),
        rankings=agreement.compare(baseline, candidate, ks, own),
    )
    write(report.document(comparison) if asked.as_json else report.text(comparison))
    return True


def _cost(asked: Asked) -> str:
    """What is to be paid, where something may be; of a machine of the user's own, nothing is."""
    sides = {"baseline": asked.baseline, "candidate": asked.candidate}
    asleep = [name for name, where in sides.items() if may_sleep(where)]
    if not asleep:
        return ""
    which = "both deployments" if len(asleep) > 1 else f"the {asleep[0]}"
    verb = "they sleep" if len(asleep) > 1 else "it sleeps"
    return f"Wakes {which} where {verb}. A start is paid, and so is the time until {verb} again."


def _read(asked: Asked) -> tuple[Texts, Texts, NDArray[np.int64] | None]:
    """Documents, queries, and the document that each query was taken from, if it was."""
    files = [asked.corpus] if asked.queries is None else [asked.corpus, asked.queries]
    check_column(asked.text_column, *files)
    # Only what the variables say of texts; where the services are, the arguments say.
    truncate = ClientConfig(backend="local", model=None, dimensions=None).truncate
    corpus, *asking = (texts.read(path, asked.text_column, truncate) for path in files)
    documents = corpus.sampled(asked.sample)
    if asking:
        return documents, asking[0].sampled(asked.sample), None
    return documents, *texts.derived(documents)


def _ks(asked: Sequence[int] | None, ranked: int, derived: bool) -> list[int]:
    """The k that say something: the first k of k documents are the same ones always."""
    ranks = f"{ranked} different documents to rank for each query"
    if derived:
        ranks += ", the one that the query was taken from left out"
    if ranked < 2:
        raise ConfigurationError(f"{ranks}: there must be at least two.")
    if asked is None:
        return [k for k in USUAL_KS if k < ranked]
    if wrong := [k for k in asked if k >= ranked]:
        raise ConfigurationError(f"--k {max(wrong)}: there are {ranks}, and k must be less.")
    return sorted({1, *asked})


def _probed(sides: Sequence[Deployment], queries: Texts) -> int:
    """The vectors' dimensions. One query, so that what fails does so before all is embedded."""
    one = replace(queries, texts=queries.texts[:1], places=queries.places[:1])
    found: list[int] = [side.embed(one, "query", lambda _: None).shape[1] for side in sides]
    if found[0] != found[1]:
        raise ConfigurationError(
            f"the baseline's vectors have {found[0]} dimensions, the candidate's {found[1]}: "
            "--dimensions asks both for the same."
        )
    return found[0]


def _embedded(sides: Sequence[Deployment], documents: Texts, queries: Texts) -> list[Vectored]:
    done: list[Vectored] = []
    for side in sides:
        try:
            with progress_bar(len(documents) + len(queries), side.name) as advance:
                done.append(
                    Vectored(
                        side.embed(documents, "document", advance),
                        side.embed(queries, "query", advance),
                    )
                )
        except KalmError:
            if done:
                write(_lost(documents, queries), sys.stderr)
            raise
    return done


def _lost(documents: Texts, queries: Texts) -> str:
    return wrapped(
        f"The baseline had embedded all {len(documents):,} documents and {len(queries):,} queries; "
        "then the candidate failed. The baseline's vectors are not kept: another run embeds them "
        "again, so first mend the candidate (`kalm doctor --wake`), or try with a smaller --sample."
    )
