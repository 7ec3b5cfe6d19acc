"""`kalm eval retrieval`: nDCG, recall and MRR on texts with relevance judgments."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.evaluation.systems import (
    System,
    Texts,
    Vectors,
    connected,
    parse,
    read_rows,
    search,
)

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalOptions:
    """Options of `kalm eval retrieval`; its help explains each."""

    folder: Path
    systems: tuple[str, ...] = ()
    dimensions: tuple[int, ...] = ()
    query_instructions: tuple[str, ...] = ()
    split: str = "test"
    k: tuple[int, ...] = (10, 100)
    plot: Path | None = None
    as_json: bool = False


class Judged(NamedTuple):
    """A folder in BEIR's format: texts, their IDs, and the relevance of documents by query."""

    documents: Texts
    document_ids: list[str]
    queries: Texts
    query_ids: list[str]
    relevance: dict[str, dict[str, int]]


def run(options: RetrievalOptions) -> None:
    """Evaluate every system, and print the figures.

    Raises:
        ConfigurationError: Arguments or files that cannot work.
        KalmError: A service failed; the message names it.
        ImportError: The extra "eval" is not installed.
    """
    judged = read(options.folder, options.split)
    with connected(_specs(options)) as systems:
        values = evaluate(systems, judged, options.k)
        document = {
            "folder": str(options.folder),
            "documents": len(judged.document_ids),
            "queries": len(judged.query_ids),
            "systems": [
                system.describe() | {"measures": summarize(values, number)}
                for number, system in enumerate(systems)
            ],
        }
    if options.as_json:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        _print(document)
    if options.plot:
        _plot(document, options.plot)


def _specs(options: RetrievalOptions) -> list[tuple[str, dict[str, Any]]]:
    """Name and client arguments: each system with each number of dimensions and each prompt."""
    specs = {}
    for spec, dimensions, prompt in product(
        options.systems or ("",),
        options.dimensions or (None,),
        options.query_instructions or (None,),
    ):
        more = {"dimensions": dimensions, "query_instruction": prompt}
        more = {name: value for name, value in more.items() if value is not None}
        named = [spec or "KALM_* variables", *(f"{k}={v}" for k, v in more.items())]
        specs[" ".join(named)] = parse(spec) | more
    return list(specs.items())


def read(folder: Path, split: str) -> Judged:
    """Read corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv. Queries without judgments are dropped.

    Raises:
        ConfigurationError: A file is missing or malformed, or no query has a relevant document.
    """
    relevance: dict[str, dict[str, int]] = {}
    path = folder / "qrels" / f"{split}.tsv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                judgments = relevance.setdefault(row["query-id"], {})
                judgments[row["corpus-id"]] = int(row["score"])
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}.") from error
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"{path}: not a table of query-id, corpus-id and score, separated by tabs ({error!r})."
        ) from error
    documents, document_ids = _texts(folder / "corpus.jsonl")
    queries, query_ids = _texts(folder / "queries.jsonl")
    known = set(document_ids)
    answered = {
        query
        for query, judged in relevance.items()
        if any(judged[d] > 0 for d in judged.keys() & known)
    }
    keep = [row for row, query in enumerate(query_ids) if query in answered]
    if len(keep) < 2:
        raise ConfigurationError(f"{path}: fewer than two queries have a relevant document.")
    return Judged(
        documents,
        document_ids,
        Texts([queries.texts[row] for row in keep], [queries.places[row] for row in keep]),
        [query_ids[row] for row in keep],
        {query_ids[row]: relevance[query_ids[row]] for row in keep},
    )


def _texts(path: Path) -> tuple[Texts, list[str]]:
    texts, places, ids = [], [], []
    for place, text, columns in read_rows(path, None):
        if "_id" not in columns:
            raise ConfigurationError(f"{place} has no '_id'.")
        texts.append(f"{columns.get('title') or ''} {text}".strip())
        places.append(place)
        ids.append(str(columns["_id"]))
    if len(set(ids)) < len(ids):
        raise ConfigurationError(f"{path}: two rows have the same '_id'.")
    return Texts(texts, places), ids


def evaluate(systems: Sequence[System], judged: Judged, ks: Sequence[int]) -> dict[str, Values]:
    """Measure every system on every query.

    Returns:
        For nDCG@10, MRR@10 and recall at each k an array of shape (systems, queries).
    """
    import ir_measures
    from ir_measures import RR, R, nDCG

    measures = {"nDCG@10": nDCG @ 10, "MRR@10": RR @ 10, **{f"recall@{k}": R @ k for k in ks}}
    names = {measure: name for name, measure in measures.items()}
    values = {name: np.zeros((len(systems), len(judged.query_ids))) for name in measures}
    queries = [system.embed(judged.queries, "query") for system in systems]  # cheap: fails early
    row_of = {name: row for row, name in enumerate(judged.document_ids)}
    # A document with the query's ID is the query itself, as BEIR has it.
    own = np.array([row_of.get(name, -1) for name in judged.query_ids])
    column_of = {name: column for column, name in enumerate(judged.query_ids)}
    embedded: dict[tuple[str, str], Vectors] = {}
    for number, system in enumerate(systems):
        key = (system.service, system.client.cache_namespace)
        if key not in embedded:
            embedded[key] = system.embed(judged.documents, "document")
        nearest = search(queries[number], embedded[key], max(10, *ks), own)
        # Scores are ranks: the libraries would order ties in their own way.
        ranking = {
            query: {judged.document_ids[row]: float(-rank) for rank, row in enumerate(rows)}
            for query, rows in zip(judged.query_ids, nearest.tolist(), strict=True)
        }
        for each in ir_measures.iter_calc(list(names), judged.relevance, ranking):
            values[names[each.measure]][number, column_of[each.query_id]] = each.value
    return values


def summarize(values: dict[str, Values], system: int) -> dict[str, dict[str, Any]]:
    """Mean and 95 % interval of each measure, and the difference to the first system.

    Intervals are percentile bootstraps over queries. p is that of a paired randomization test,
    adjusted for the number of systems (Benjamini-Hochberg).
    """
    from scipy.stats import bootstrap, false_discovery_control, permutation_test

    def interval(sample: Values) -> dict[str, float]:
        limits = bootstrap(
            *((sample,), np.mean), n_resamples=2000, batch=100, method="percentile", rng=0
        ).confidence_interval
        return {"mean": float(sample.mean()), "low": float(limits.low), "high": float(limits.high)}

    def p(difference: Values) -> float:
        return float(
            permutation_test(
                *((difference,), np.mean), permutation_type="samples", batch=100, rng=0
            ).pvalue
        )

    summary: dict[str, dict[str, Any]] = {}
    for name, table in values.items():
        summary[name] = interval(table[system])
        if system:
            adjusted = false_discovery_control([p(row - table[0]) for row in table[1:]])
            summary[name]["difference"] = interval(table[system] - table[0]) | {
                "p": float(adjusted[system - 1])
            }
    return summary


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    systems = document["systems"]
    table = Table("system", box=None, pad_edge=False)
    for name in systems[0]["measures"]:
        table.add_column(name)
    table.add_column("nDCG@10 to the first")
    table.add_column("p")
    for system in systems:
        cells = [
            "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**m) for m in system["measures"].values()
        ]
        if difference := system["measures"]["nDCG@10"].get("difference"):
            cells += ["{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference)]
            cells += ["{p:.4f}".format(**difference)]
        table.add_row(system["name"], *cells)
    console = Console(highlight=False)
    console.print(f"{document['documents']:,} documents, {document['queries']:,} queries")
    console.print(table)


def _plot(document: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    systems = document["systems"]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.5 * len(systems)), layout="constrained")
    for row, system in enumerate(systems):
        found = system["measures"]["nDCG@10"]
        axes.plot([found["low"], found["high"]], [row, row], color="tab:blue")
        axes.plot(found["mean"], row, "o", color="tab:blue")
    axes.set_yticks(range(len(systems)), [system["name"] for system in systems])
    axes.invert_yaxis()
    axes.set_xlabel("nDCG@10 with 95 % intervals")
    figure.savefig(path)
    plt.close(figure)
