"""`kalm eval compare`: how far two systems agree on texts without relevance judgments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.evaluation.report import plot, write
from kalm_integrations.evaluation.systems import connected, parse
from kalm_integrations.evaluation.texts import Texts, read_distinct, search

DEPTH: Final = 100
"""Nearest documents of the baseline whose order is compared."""

Values = NDArray[np.floating[Any]]


def run(
    named: tuple[str, str],
    *,
    corpus: Path,
    queries_path: Path | None,
    text_column: str | None,
    sample: int,
    k: Sequence[int],
    plot_path: Path | None,
    as_json: bool,
) -> None:
    """Embed the texts with both systems, and print how far they agree.

    The command's help explains the options.

    Raises:
        ConfigurationError: Arguments or texts that cannot work.
        KalmError: A service failed; the message names it.
        ImportError: The extra "eval" is not installed.
    """
    queries = documents = read_distinct(corpus, text_column, sample)
    own = np.arange(len(documents.texts))  # each document is left out of its own results
    if queries_path:
        queries = read_distinct(queries_path, text_column, sample)
        own = np.full(len(queries.texts), -1)
    ranked = len(documents.texts) - (queries is documents)
    ks = sorted({each for each in k if each < ranked})
    if not ks:
        raise ConfigurationError(f"{corpus}: too few texts for k={min(k)}.")
    with connected([(spec, parse(spec)) for spec in named]) as systems:
        query_vectors = [system.embed(queries, "query") for system in systems]  # few: fails early
        document_vectors = [system.embed(documents, "document") for system in systems]
        sides = [system.describe() for system in systems]
    values = agreement(query_vectors, document_vectors, own, ks, min(DEPTH, ranked))
    if (
        sides[0]["model"] == sides[1]["model"]
        and document_vectors[0].shape == document_vectors[1].shape
    ):
        values["cosine of queries"] = np.einsum("td,td->t", *query_vectors)
        values["cosine of documents"] = np.einsum("td,td->t", *document_vectors)
    figures = {
        name: distribution(each, documents if name.endswith("documents") else queries)
        for name, each in values.items()
    }
    document: dict[str, Any] = dict(zip(("baseline", "candidate"), sides, strict=True))
    document |= {"documents": len(documents.texts), "queries": len(queries.texts)}
    rows = [
        {"": name} | {key: x if isinstance(x, str) else f"{x:.4f}" for key, x in figure.items()}
        for name, figure in figures.items()
    ]
    write(document | {"figures": figures}, rows, as_json=as_json)
    if plot_path:
        intervals = {name: (x["lowest"], x["mean"], 1.0) for name, x in figures.items() if x}
        plot(intervals, "mean, and the range from the lowest value to 1", plot_path)


def agreement(
    queries: list[Values],
    documents: list[Values],
    own: NDArray[np.int64],
    ks: list[int],
    depth: int,
) -> dict[str, Values]:
    """How far the rankings of two systems agree, for each query.

    Args:
        queries: Unit vectors of the queries by the baseline and the candidate.
        documents: Unit vectors of the documents.
        own: For each query the row of a document to leave out, or -1.
        ks: Numbers of nearest documents to compare.
        depth: Number of the baseline's nearest documents whose order is compared.

    Returns:
        For each k the share of the baseline's first k documents among the candidate's; and
        Spearman's rank correlation, NaN where all documents are equally near.
    """
    from scipy.stats import rankdata

    pairs = list(zip(queries, documents, strict=True))
    first, second = (np.array(search(*pair, max(depth, *ks), own)) for pair in pairs)
    values: dict[str, Values] = {}
    for k in ks:
        both = zip(first[:, :k].tolist(), second[:, :k].tolist(), strict=True)
        values[f"overlap@{k}"] = np.array([len({*one} & {*other}) / k for one, other in both])
    scores = (np.einsum("qd,qkd->qk", q, d[first[:, :depth]]).round(6) for q, d in pairs)
    one, other = (rankdata(each, axis=1) - (depth + 1) / 2 for each in scores)
    lengths = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
    lengths[lengths == 0] = np.nan
    values[f"rank correlation@{depth}"] = (one * other).sum(axis=1) / lengths
    return values


def distribution(values: Values, texts: Texts) -> dict[str, Any]:
    """Mean and percentiles without NaN, and the name of the text with the lowest value."""
    if np.isnan(values).all():
        return {}
    median, p5, p1 = np.nanpercentile(values, [50, 5, 1]).tolist()
    figures = {"mean": float(np.nanmean(values)), "median": median, "p5": p5, "p1": p1}
    lowest = int(np.nanargmin(values))
    return figures | {"lowest": float(values[lowest]), "lowest_at": texts.names[lowest]}
