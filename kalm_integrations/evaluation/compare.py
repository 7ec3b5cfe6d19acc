"""`kalm eval compare`: how far two systems agree on texts without relevance judgments."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.evaluation.systems import Texts, connected, parse, read_rows, search

DEPTH: Final = 100
"""Nearest documents of the baseline whose order is compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """Options of `kalm eval compare`; its help explains each."""

    baseline: str
    candidate: str
    corpus: Path
    queries: Path | None = None
    text_column: str | None = None
    sample: int = 2000
    k: tuple[int, ...] = (1, 10, 100)
    plot: Path | None = None
    as_json: bool = False


def run(options: CompareOptions) -> None:
    """Embed the texts with both systems, and print how far they agree.

    Raises:
        ConfigurationError: Arguments or texts that cannot work.
        KalmError: A service failed; the message names it.
        ImportError: The extra "eval" is not installed.
    """
    documents = _texts(options.corpus, options.text_column, options.sample)
    # Without queries, documents are searched for, and each is left out of its own results.
    queries = (
        _texts(options.queries, options.text_column, options.sample)
        if options.queries
        else documents
    )
    own = np.full(len(queries.texts), -1)
    if not options.queries:
        own = np.arange(len(documents.texts))
    others = len(documents.texts) - (options.queries is None)
    ks = sorted(k for k in options.k if k < others)
    if not ks:
        raise ConfigurationError(
            f"{options.corpus}: too few different texts for k={min(options.k)}."
        )
    specs = [(spec, parse(spec)) for spec in (options.baseline, options.candidate)]
    with connected(specs) as systems:
        found = [system.embed(queries, "query") for system in systems]
        texts = [system.embed(documents, "document") for system in systems]
        depth = min(DEPTH, others)
        nearest = [search(*pair, max(depth, *ks), own) for pair in zip(found, texts, strict=True)]
        figures = {f"overlap@{k}": overlap(*nearest, k) for k in ks}
        scores = [
            np.einsum("qd,qkd->qk", q, d[nearest[0][:, :depth]])
            for q, d in zip(found, texts, strict=True)
        ]
        figures[f"rank correlation of {depth}"] = rank_correlation(*scores)
        one, other = (system.client.served_model for system in systems)
        if one == other and texts[0].shape == texts[1].shape:
            figures["cosine, documents"] = np.einsum("td,td->t", *texts)
            figures["cosine, queries"] = np.einsum("qd,qd->q", *found)
        document = {
            "baseline": systems[0].describe(),
            "candidate": systems[1].describe(),
            "documents": len(documents.texts),
            "queries": len(queries.texts),
            "figures": {
                name: _distribution(values, documents if "documents" in name else queries)
                for name, values in figures.items()
            },
        }
    if options.as_json:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        _print(document)
    if options.plot:
        _plot(figures, options.plot)


def _texts(path: Path, column: str | None, maximum: int) -> Texts:
    """Different texts of a file or folder; of more than `maximum` a random sample, always the
    same one."""
    places: dict[str, str] = {}
    for place, text, _ in read_rows(path, column):
        places.setdefault(text, place)
    texts = list(places)
    if len(texts) > maximum:
        rows = np.random.default_rng(0).choice(len(texts), maximum, replace=False)
        texts = [texts[row] for row in np.sort(rows)]
    return Texts(texts, [places[text] for text in texts])


def overlap(
    baseline: NDArray[np.int64], candidate: NDArray[np.int64], k: int
) -> NDArray[np.float64]:
    """For each query, the share of the baseline's first k documents among the candidate's."""
    pairs = zip(baseline[:, :k].tolist(), candidate[:, :k].tolist(), strict=True)
    return np.array([len({*one} & {*other}) / k for one, other in pairs])


def rank_correlation(
    baseline: NDArray[np.floating[Any]], candidate: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    """Spearman's correlation of each row of scores; NaN where all scores of a row are equal."""
    from scipy.stats import rankdata

    one, other = (rankdata(scores.round(6), axis=1) for scores in (baseline, candidate))
    one, other = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (one, other))
    lengths = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
    with np.errstate(invalid="ignore"):
        return np.asarray((one * other).sum(axis=1) / lengths)


def _distribution(values: NDArray[np.floating[Any]], texts: Texts) -> dict[str, Any]:
    """Mean and percentiles, and the place of the text with the lowest value."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {"mean": None}
    p1, p5, median = np.percentile(known, [1, 5, 50]).tolist()
    return {
        "mean": float(known.mean()),
        "median": median,
        "p5": p5,
        "p1": p1,
        "lowest": float(known.min()),
        "lowest_at": texts.places[int(np.nanargmin(values))],
    }


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for side in ("baseline", "candidate"):
        found = document[side]
        known = (
            f"{found['quantization']}, {found['fingerprint']}"
            if found["fingerprint"]
            else "no identity"
        )
        console.print(f"{side}: {found['name']}, {found['model']} ({known})", markup=False)
    console.print(f"{document['documents']:,} documents, {document['queries']:,} queries")
    table = Table("", "mean", "median", "p5", "p1", "lowest", "at", box=None, pad_edge=False)
    for name, figure in document["figures"].items():
        *numbers, place = figure.values() if len(figure) > 1 else ("",)
        table.add_row(name, *(f"{number:.4f}" for number in numbers), place)
    console.print(table)


def _plot(figures: dict[str, NDArray[np.floating[Any]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(figures), figsize=(3 * len(figures), 3), layout="constrained"
    )
    for axis, (name, values) in zip(axes, figures.items(), strict=True):
        axis.hist(values[~np.isnan(values)], bins=20)
        axis.set_title(name)
    figure.savefig(path)
    plt.close(figure)
