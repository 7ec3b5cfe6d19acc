"""The options of `kalm eval`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kalm_integrations.argparsing import add_json, number, path

if TYPE_CHECKING:
    from kalm_integrations.argparsing import Parser, Verbs

_SYSTEM = (
    "a URL, the name of an app on Modal, or `local`; arguments of the client may follow, as in "
    '"https://api.openai.com/v1 model=text-embedding-3-small api_key_variable=OPENAI_API_KEY"'
)


def add(verbs: Verbs) -> None:
    """Add the commands."""
    parser = verbs.add_parser(
        "eval",
        help="compare deployments, models, prompts and dimensions on your texts",
        description="Compare deployments, models, prompts and dimensions on your texts.",
    )
    kinds = parser.add_subparsers(title="what to evaluate", metavar="WHAT", required=True)
    retrieval = kinds.add_parser(
        "retrieval",
        help="measure nDCG, recall and MRR on texts with relevance judgments",
        description="Measure nDCG, recall and MRR on texts with relevance judgments. Starts the "
        "services, which costs money on Modal.",
    )
    retrieval.add_argument(
        "folder",
        metavar="FOLDER",
        type=path,
        help="in BEIR's format: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv",
    )
    retrieval.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="SYSTEM",
        help=f"{_SYSTEM}; may be repeated, and the first one is the baseline. Default: the KALM_* "
        "variables",
    )
    retrieval.add_argument(
        "--dimensions", type=_numbers, default=(), metavar="N,N", help="of each system"
    )
    retrieval.add_argument(
        "--query-instruction",
        action="append",
        default=[],
        metavar="TEXT",
        help="a preset or task, for each system; may be repeated",
    )
    retrieval.add_argument(
        "--split", default="test", metavar="NAME", help="of qrels; default: %(default)s"
    )
    retrieval.set_defaults(run=_retrieval, verb="eval retrieval", extra="eval")
    compare = kinds.add_parser(
        "compare",
        help="tell how far two systems agree, without judgments",
        description="Tell how far two systems find the same, without relevance judgments. Starts "
        "the services, which costs money on Modal.",
    )
    compare.add_argument("baseline", metavar="A", help=_SYSTEM)
    compare.add_argument("candidate", metavar="B", help="the other one")
    compare.add_argument(
        "--corpus",
        type=path,
        required=True,
        metavar="PATH",
        help="documents: a file or folder of `kalm embed`",
    )
    compare.add_argument(
        "--queries", type=path, metavar="PATH", help="the same, of queries; default: the documents"
    )
    compare.add_argument("--text-column", metavar="NAME", help="the text; default: text")
    compare.add_argument(
        "--sample",
        type=number(3),
        default=2000,
        metavar="N",
        help="maximum number of documents and of queries; default: %(default)s",
    )
    compare.set_defaults(run=_compare, verb="eval compare", extra="eval")
    _add_output(retrieval, "10,100")
    _add_output(compare, "1,10,100")


def _add_output(parser: Parser, ks: str) -> None:
    parser.add_argument(
        "--k",
        type=_numbers,
        default=ks,
        metavar="K,K",
        help="numbers of results; default: %(default)s",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures into a file")
    add_json(parser)


def _numbers(value: str) -> tuple[int, ...]:
    return tuple(map(number(1), value.split(",")))


def _retrieval(arguments: argparse.Namespace) -> bool:
    from kalm_integrations.evaluation.retrieval import RetrievalOptions, run

    run(
        RetrievalOptions(
            folder=arguments.folder,
            systems=tuple(arguments.system),
            dimensions=arguments.dimensions,
            query_instructions=tuple(arguments.query_instruction),
            split=arguments.split,
            k=arguments.k,
            plot=arguments.plot,
            as_json=arguments.json,
        )
    )
    return True


def _compare(arguments: argparse.Namespace) -> bool:
    from kalm_integrations.evaluation.compare import CompareOptions, run

    names = ("baseline", "candidate", "corpus", "queries", "text_column", "sample", "k", "plot")
    options = {name: getattr(arguments, name) for name in names}
    run(CompareOptions(**options, as_json=arguments.json))
    return True
