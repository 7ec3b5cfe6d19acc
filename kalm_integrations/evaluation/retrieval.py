"""`kalm eval retrieval`: nDCG, recall and MRR on texts with relevance judgments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.evaluation.report import plot, write
from kalm_integrations.evaluation.systems import System, Vectors, connected, parse
from kalm_integrations.evaluation.texts import Judged, read_judged, search

Values = NDArray[np.float64]


def run(
    folder: Path,
    *,
    systems: Sequence[str],
    dimensions: Sequence[int],
    query_instructions: Sequence[str],
    split: str,
    k: Sequence[int],
    plot_path: Path | None,
    as_json: bool,
) -> None:
    """Evaluate every system, and print the measures; the command's help explains the options.

    Raises:
        ConfigurationError: Arguments or files that cannot work.
        KalmError: A service failed; the message names it.
        ImportError: The extra "eval" is not installed.
    """
    judged = read_judged(folder, split)
    with connected(_specs(systems, dimensions, query_instructions)) as made:
        measures = summarize(evaluate(made, judged, k))
        rows = [
            system.describe() | {"measures": measured}
            for system, measured in zip(made, measures, strict=True)
        ]
    sizes = {"documents": len(judged.documents.texts), "queries": len(judged.queries.texts)}
    write(sizes | {"systems": rows}, list(map(_cells, rows)), as_json=as_json)
    if plot_path:
        main = {row["name"]: row["measures"]["nDCG@10"] for row in rows}
        intervals = {name: (x["low"], x["mean"], x["high"]) for name, x in main.items()}
        plot(intervals, "nDCG@10 with 95 % intervals", plot_path)


def _specs(
    systems: Sequence[str], sizes: Sequence[int], prompts: Sequence[str]
) -> list[tuple[str, dict[str, Any]]]:
    """Name and client arguments: each system with each number of dimensions and each prompt."""
    specs = {}
    for spec, dimensions, prompt in product(systems or ("",), sizes or (None,), prompts or (None,)):
        more = {"dimensions": dimensions, "query_instruction": prompt}
        more = {name: value for name, value in more.items() if value is not None}
        name = " ".join([spec, *(f"{key}={value}" for key, value in more.items())]).strip()
        specs[name or "KALM_* variables"] = parse(spec) | more
    return list(specs.items())


def evaluate(systems: Sequence[System], judged: Judged, ks: Sequence[int]) -> dict[str, Values]:
    """Measure every system on every query.

    Returns:
        For nDCG@10, MRR@10 and recall at each k an array of shape (systems, queries).
    """
    import ir_measures
    from ir_measures import RR, R, nDCG

    measures = {nDCG @ 10: "nDCG@10", RR @ 10: "MRR@10"} | {R @ k: f"recall@{k}" for k in ks}
    names, query_names = judged.documents.names, judged.queries.names
    values = {name: np.zeros((len(systems), len(query_names))) for name in measures.values()}
    row_of = {name: row for row, name in enumerate(names)}
    column_of = {name: column for column, name in enumerate(query_names)}
    # A document with the ID of a query is the query itself, and no result: a rule of BEIR.
    own = np.array([row_of.get(name, -1) for name in query_names])
    # Queries first: they are few, and show whether a system works at all.
    queries = [system.embed(judged.queries, "query") for system in systems]
    documents: dict[tuple[str, str], Vectors] = {}  # prompts of queries share them
    for number, system in enumerate(systems):
        key = (system.service, system.client.cache_namespace)
        if key not in documents:
            documents[key] = system.embed(judged.documents, "document")
        nearest = search(queries[number], documents[key], max(10, *ks), own)
        # Scores are ranks, since the libraries break ties in their own way.
        ranking = {
            query: {names[row]: -float(rank) for rank, row in enumerate(rows)}
            for query, rows in zip(query_names, nearest, strict=True)
        }
        for value in ir_measures.iter_calc(list(measures), judged.relevance, ranking):
            values[measures[value.measure]][number, column_of[value.query_id]] = value.value
    return values


def summarize(values: dict[str, Values]) -> list[dict[str, dict[str, Any]]]:
    """For each system the mean of each measure, and its difference to the first system.

    Intervals are percentile bootstraps over queries. p is that of a paired randomization test,
    adjusted for the number of systems (Benjamini-Hochberg).

    Args:
        values: By measure, shape (systems, queries).
    """
    from scipy.stats import false_discovery_control, permutation_test

    options = {"permutation_type": "samples", "n_resamples": 2000, "batch": 1000, "rng": 0}
    summaries: list[dict[str, dict[str, Any]]] = [{} for _ in next(iter(values.values()))]
    for name, table in values.items():
        for summary, row in zip(summaries, table, strict=True):
            summary[name] = _interval(row)
        tests = [permutation_test((row,), np.mean, **options) for row in table[1:] - table[0]]
        adjusted = false_discovery_control([test.pvalue for test in tests]) if tests else []
        for summary, row, p in zip(summaries[1:], table[1:], adjusted, strict=True):
            summary[name]["difference"] = _interval(row - table[0]) | {"p": float(p)}
    return summaries


def _interval(sample: Values) -> dict[str, float]:
    from scipy.stats import bootstrap

    options = {"n_resamples": 2000, "batch": 1000, "method": "percentile", "rng": 0}
    low, high = bootstrap((sample,), np.mean, **options).confidence_interval
    return {"mean": float(sample.mean()), "low": float(low), "high": float(high)}


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """A row of the table."""
    cells = {"system": row["name"]}
    for name, measure in row["measures"].items():
        cells[name] = "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**measure)
    if difference := row["measures"]["nDCG@10"].get("difference"):
        shown = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference)
        cells |= {"nDCG@10 to the first": shown, "p": f"{difference['p']:.4f}"}
    return cells
