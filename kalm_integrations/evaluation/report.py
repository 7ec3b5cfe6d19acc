"""What a comparison of two deployments prints: the figures, and what they can and cannot tell."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from kalm_integrations.evaluation.agreement import Figures, Rankings, Spread
from kalm_integrations.evaluation.deployments import Deployment
from kalm_integrations.evaluation.texts import Texts
from kalm_integrations.models import NAMED_SPACES
from kalm_integrations.terminal import printable, wrapped
from kalm_integrations.version import __version__

_MARGIN: Final = 12
_NAMES: Final = {space: name for name, space in NAMED_SPACES.items()}

_COSINE: Final = (
    "cosine: between the two vectors of one text; 1 is the same direction. However near 1, never "
    "put vectors of both into one index."
)
_OVERLAP: Final = (
    "overlap: of the baseline's first k documents for a query, the share that is among the "
    "candidate's first k. By chance: what two random rankings would share."
)
_ORDER: Final = (
    "order: Spearman's rank correlation over the documents that the baseline ranks first; 1 is the "
    "same order, 0 an unrelated one."
)
_NOT_TOLD: Final = (
    "Not told: which of the two is better. Nobody judged these hits, so this is agreement, not "
    "quality; hits that differ may be as good. And no figure here is a limit to pass."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that a report is made of; `derived` is whether the queries are first sentences
    of the documents, each of which is left out of its own query's rankings."""

    sides: Sequence[Deployment]
    dimensions: int
    documents: Texts
    queries: Texts
    derived: bool
    document_cosines: Figures
    query_cosines: Figures
    rankings: Rankings


def text(comparison: Comparison) -> str:
    """For people."""
    parts = [_facts(comparison), _table(comparison), _reading(comparison)]
    return "\n\n".join("\n".join(part) for part in parts)


def document(comparison: Comparison) -> str:
    """All of it as JSON; docs/evaluate.md has the fields."""
    rankings, documents, queries = comparison.rankings, comparison.documents, comparison.queries
    content: dict[str, Any] = {
        "version": __version__,
        **{side.name: _side(side) for side in comparison.sides},
        "dimensions": comparison.dimensions,
        "corpus": _source(documents),
        "queries": None if comparison.derived else _source(queries),
        "compared": {"documents": len(documents), "queries": len(queries)},
        "cosine": {
            "documents": _spread(comparison.document_cosines, documents),
            "queries": _spread(comparison.query_cosines, queries),
        },
        "overlap": [
            {"k": k, **_spread(found, queries), "by_chance": k / rankings.ranked}
            for k, found in rankings.overlap.items()
        ],
        "order": {
            "depth": rankings.depth,
            **(_spread(rankings.order, queries) if _defined(rankings.order) else {}),
            "undefined": len(queries) - _defined(rankings.order),
        },
        "warnings": list(_warnings(comparison)),
    }
    return json.dumps(content, indent=2)


def _facts(comparison: Comparison) -> Iterator[str]:
    for side in comparison.sides:
        yield _line(side.name, f"{_called(side)}, {side.where}")
    documents, queries, rankings = comparison.documents, comparison.queries, comparison.rankings
    yield _line("documents", _counted(documents))
    if comparison.derived:
        yield _line("queries", f"first sentences of {len(queries):,} of these documents")
    else:
        yield _line("queries", _counted(queries))
    own = ", its own left out" if comparison.derived else ""
    yield _line("ranked", f"{rankings.ranked:,} documents for each query{own}")
    yield _line("dimensions", str(comparison.dimensions))


def _table(comparison: Comparison) -> Iterator[str]:
    rankings = comparison.rankings
    chances = {f"overlap@{k}": k / rankings.ranked for k in rankings.overlap}
    figures = {
        "cosine, documents": comparison.document_cosines,
        "cosine, queries": comparison.query_cosines,
        **{f"overlap@{k}": found for k, found in rankings.overlap.items()},
        f"order of first {rankings.depth}": rankings.order,
    }
    yield _row("", "mean", "median", "p5", "p1", "least", "by chance")
    for name, values in figures.items():
        if _defined(values):
            spread = Spread.of(values)
            shown = (spread.mean, spread.median, spread.p5, spread.p1, spread.least)
            chance = f"{chances[name]:.4f}" if name in chances else ""
            yield _row(name, *map(_shown, shown), chance)
        else:
            yield _row(name, "undefined")


def _reading(comparison: Comparison) -> Iterator[str]:
    documents, queries = comparison.documents, comparison.queries
    k = max(comparison.rankings.overlap)
    for what, figures, of in (
        ("cosine", comparison.document_cosines, documents),
        (f"overlap@{k}", comparison.rankings.overlap[k], queries),
    ):
        least = Spread.of(figures)
        at = f"{of.places[least.least_at]}: {_shown(least.least)}"
        yield wrapped(printable(f"Least {what}, {at}"))
    yield from map(wrapped, (_COSINE, _OVERLAP, _ORDER, _NOT_TOLD))
    yield from (_line("!", warning, 2) for warning in _warnings(comparison))


def _warnings(comparison: Comparison) -> Iterator[str]:
    """What makes these figures say less than they seem to."""
    baseline, candidate = comparison.sides
    for side in comparison.sides:
        if side.space is None:
            yield (
                f"The {side.name} reports no identity: that it serves {side.model}, in one "
                "quantization all the time, nobody has checked."
            )
    if baseline.space is not None and candidate.space is not None:
        if baseline.space == candidate.space:
            yield (
                "Both report the same identity. These figures are the noise of two runs: what "
                "another quantization is to be measured against."
            )
        elif replace(baseline.space, quantization=candidate.space.quantization) != candidate.space:
            yield (
                "They differ in more than their quantization: "
                f"{baseline.space.differences(candidate.space)}."
            )
    documents, queries = comparison.documents, comparison.queries
    if len(documents) < documents.found:
        yield (
            f"{len(documents):,} of {documents.found:,} documents were drawn. Among all of them "
            "neighbours are nearer to each other, and rankings agree less; --sample takes more."
        )
    if comparison.derived:
        yield (
            "First sentences of documents are not what users ask: --queries takes a file of real "
            "queries, which tell more."
        )
    if undefined := len(queries) - _defined(comparison.rankings.order):
        yield f"For {undefined:,} queries all documents are equally near, so there is no order."


def _called(side: Deployment) -> str:
    if side.space is None:
        return f"{side.model}, no identity reported"
    name = f"{_NAMES[side.space]}, " if side.space in _NAMES else ""
    return f"{side.model}, {side.space.quantization} ({name}{side.space.fingerprint})"


def _counted(texts: Texts) -> str:
    drawn = f"{len(texts):,} of " if len(texts) < texts.found else ""
    copies = f"; {texts.copies:,} copies left out" if texts.copies else ""
    return f"{drawn}{texts.found:,} different texts, {texts.origin}{copies}"


def _side(side: Deployment) -> dict[str, Any]:
    space = side.space
    return {
        "where": side.where,
        "model": side.model,
        "identity": space.to_dict() if space else None,
        "fingerprint": space.fingerprint if space else None,
    }


def _source(texts: Texts) -> dict[str, Any]:
    return {"from": texts.origin, "different": texts.found, "copies": texts.copies}


def _spread(figures: Figures, texts: Texts) -> dict[str, Any]:
    values = asdict(Spread.of(figures))
    place = texts.places[values.pop("least_at")]
    return {name: round(value, 9) for name, value in values.items()} | {"least_at": place}


def _defined(figures: Figures) -> int:
    return int(np.count_nonzero(~np.isnan(figures)))


def _shown(value: float) -> str:
    """Rounded down, so that 1 is shown of nothing less."""
    return f"{np.floor(value * 1e4 + 1e-6) / 1e4:.4f}"


def _row(name: str, *cells: str) -> str:
    return "".join([name.ljust(20), *(cell.rjust(10) for cell in cells)]).rstrip()


def _line(name: str, said: str, margin: int = _MARGIN) -> str:
    return wrapped(printable(said), name.ljust(margin))
