"""The user's texts and the search in them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.validation import why_invalid


class Texts(NamedTuple):
    """Texts, and what names each one: its place in a file, or its ID."""

    texts: list[str]
    names: list[str]


class Judged(NamedTuple):
    """A folder in BEIR's format, with the relevance of documents to queries, by their IDs."""

    documents: Texts
    queries: Texts
    relevance: dict[str, dict[str, int]]


def _checked(text: Any, place: str) -> str:
    if reason := why_invalid(text, "end"):
        raise ConfigurationError(f"{place} {reason}. Fix or remove this text.")
    return str(text)


def read_distinct(path: Path, text_column: str | None, maximum: int) -> Texts:
    """Different texts of a file or folder; of more than `maximum` always the same sample."""
    from kalm_integrations.readers.source import rows

    places: dict[str, str] = {}
    for row in rows(str(path), text_column):
        places.setdefault(_checked(row.text, row.place), row.place)
    texts = list(places)
    if len(texts) > maximum:
        drawn = np.random.default_rng(0).choice(len(texts), maximum, replace=False)
        texts = [texts[index] for index in np.sort(drawn)]
    return Texts(texts, [places[text] for text in texts])


def read_judged(folder: Path, split: str) -> Judged:
    """Read corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv. Queries without answers are dropped.

    Raises:
        ConfigurationError: A file is malformed, or fewer than two queries are left.
        OSError: A file cannot be read.
    """
    path = folder / "qrels" / f"{split}.tsv"
    relevance: dict[str, dict[str, int]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                judgments = relevance.setdefault(row["query-id"], {})
                judgments[row["corpus-id"]] = int(row["score"])
    except (KeyError, ValueError, TypeError) as error:
        columns = "query-id, corpus-id and score, separated by tabs"
        raise ConfigurationError(f"{path}: not a table of {columns} ({error!r}).") from error
    documents, queries = (_with_ids(folder / f"{name}.jsonl") for name in ("corpus", "queries"))
    known = set(documents.names)
    relevant = {
        query: judgments
        for query, judgments in relevance.items()
        if any(judgments.get(name, 0) > 0 for name in judgments.keys() & known)
    }
    kept = [pair for pair in zip(*queries, strict=True) if pair[1] in relevant]
    if len(kept) < 2:
        raise ConfigurationError(f"{path}: fewer than two queries have a relevant document.")
    texts, names = map(list, zip(*kept, strict=True))
    return Judged(documents, Texts(texts, names), {name: relevant[name] for name in names})


def _with_ids(path: Path) -> Texts:
    from kalm_integrations.readers.source import rows

    texts: dict[str, str] = {}
    for row in rows(str(path)):
        name = str(row.columns.get("_id", ""))
        if not name or name in texts:
            raise ConfigurationError(f"{row.place} has no '_id', or that of another row.")
        text = f"{row.columns.get('title') or ''} {row.text}".strip()
        texts[name] = _checked(text, row.place)
    return Texts([*texts.values()], [*texts])


def search(
    queries: NDArray[np.floating[Any]],
    documents: NDArray[np.floating[Any]],
    k: int,
    own: NDArray[np.int64],
) -> list[NDArray[np.int64]]:
    """The k nearest documents of each query, by exact search.

    Cosines are compared to six decimals, since finer ones are noise of the transfer in float16.
    Equally near documents are ordered by their row.

    Args:
        queries: Unit vectors.
        documents: Unit vectors.
        k: Maximum number of documents.
        own: For each query the row of a document to leave out, or -1.

    Returns:
        For each query the rows of its documents, the nearest first.
    """
    nearest: list[NDArray[np.int64]] = []
    for start in range(0, len(queries), 64):
        scores = (queries[start : start + 64] @ documents.T).round(6)
        left_out = own[start : start + 64]
        known = np.flatnonzero(left_out >= 0)
        scores[known, left_out[known]] = -np.inf
        for row in scores:
            limit = np.partition(row, -k)[-k] if k < len(row) else -np.inf
            candidates = np.flatnonzero((row >= limit) & (row > -np.inf))
            nearest.append(candidates[np.argsort(-row[candidates], kind="stable")[:k]])
    return nearest
