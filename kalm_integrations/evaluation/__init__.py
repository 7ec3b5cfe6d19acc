"""`kalm eval`: how far two deployments agree, on the user's own texts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kalm_integrations.argparsing import add_json, number, path

if TYPE_CHECKING:
    from kalm_integrations.argparsing import Verbs


def add(verbs: Verbs) -> None:
    """Add the command."""
    parser = verbs.add_parser(
        "eval",
        help="compare two deployments on your own texts",
        description="Compare two deployments on your own texts.",
    )
    kinds = parser.add_subparsers(title="what to compare", metavar="WHAT", required=True)
    _add_quantization(kinds)


def _add_quantization(kinds: Verbs) -> None:
    parser = kinds.add_parser(
        "quantization",
        help="whether another quantization finds the same",
        description="Embed the same texts with two deployments of one model, for instance in bf16 "
        "and in fp8, and tell how far they find the same. Wakes both, which costs money. Keys and "
        "all else are read from the KALM_* variables; the same keys go to both. No figure makes it "
        "fail. Exit status: 1 a deployment failed, 2 wrong usage or texts that cannot be embedded.",
    )
    for name, which in (("baseline", "whose hits are kept to"), ("candidate", "to be judged")):
        parser.add_argument(
            f"--{name}",
            required=True,
            metavar="APP_OR_URL",
            help=f"the deployment {which}: a URL, or the name of an app on Modal",
        )
    parser.add_argument(
        "--corpus",
        type=path,
        required=True,
        metavar="PATH",
        help="JSON Lines (*.jsonl), plain text with one text a line (*.txt), or a folder of "
        "Markdown, reStructuredText and text files",
    )
    parser.add_argument(
        "--queries",
        type=path,
        metavar="PATH",
        help="the same, of queries; without it, first sentences of the corpus are asked",
    )
    parser.add_argument(
        "--text-column", metavar="NAME", help="of JSON Lines, the field to embed; default: text"
    )
    parser.add_argument(
        "--sample",
        type=number(2),
        default=2000,
        metavar="N",
        help="at most so many documents, and so many queries, always the same ones; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--k",
        type=_ks,
        metavar="K,K,...",
        help="how many hits to compare, and 1; default: those of 1,10,100 that the corpus is "
        "large enough for",
    )
    parser.add_argument(
        "--dimensions",
        type=number(1),
        metavar="N",
        help="of all vectors; default: KALM_DIMENSIONS, or the model's native number",
    )
    add_json(parser)
    # Errors begin with it; and a folder of documents needs this extra.
    parser.set_defaults(run=_quantization, verb="eval quantization", extra="quickstart")


def _ks(value: str) -> tuple[int, ...]:
    try:
        return tuple(map(number(1), value.split(",")))
    except argparse.ArgumentTypeError:
        wanted = "whole numbers of at least 1, like 1,10,100"
        raise argparse.ArgumentTypeError(f"{value!r} is not {wanted}") from None


def _quantization(arguments: argparse.Namespace) -> bool:
    from kalm_integrations.evaluation.quantization import Asked, run

    return run(
        Asked(
            baseline=arguments.baseline,
            candidate=arguments.candidate,
            corpus=arguments.corpus,
            queries=arguments.queries,
            text_column=arguments.text_column,
            sample=arguments.sample,
            ks=arguments.k,
            dimensions=arguments.dimensions,
            as_json=arguments.json,
        )
    )
