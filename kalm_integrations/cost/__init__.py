"""`kalm cost`: what KaLM costs on each of Modal's GPUs, for a corpus and for traffic."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Final

from kalm_integrations.argparsing import add_json, number, path, share
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.lines import TEXT_COLUMN, check_column

if TYPE_CHECKING:
    from kalm_integrations.argparsing import Verbs
    from kalm_integrations.cost.corpus import Corpus

_FACTORS: Final = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
_MOST: Final = 10**15  # of anything: above, it is a slip
_DEFAULT_UTILIZATION: Final = 0.6


def add(verbs: Verbs) -> None:
    """Add the command."""
    parser = verbs.add_parser(
        "cost",
        help="what KaLM costs on each GPU: a million tokens, your corpus, your traffic",
        description="What KaLM costs on each of Modal's GPUs, as `kalm deploy` deploys it. "
        "Measured and calculated figures are kept apart: ~ marks what nobody measured. N may end "
        "in k, M or B. Asks nobody, starts nothing.",
    )
    parser.add_argument("--gpu", type=_names, default=(), metavar="GPU,GPU", help="these only")
    parser.add_argument("--quantization", choices=["none", "fp8"], help="this one only")
    parser.add_argument(
        "--utilization",
        type=share,
        default=_DEFAULT_UTILIZATION,
        metavar="SHARE",
        help="share of a container's paid time in which it computes, for the second price of a "
        "million tokens; default: %(default)s",
    )
    corpus = parser.add_argument_group("a corpus, embedded at once").add_mutually_exclusive_group()
    corpus.add_argument("--tokens", type=_count, metavar="N", help="tokens of it")
    corpus.add_argument(
        "--corpus",
        type=path,
        metavar="PATH",
        help="JSON Lines (*.jsonl), any other text file, or a folder of Markdown, "
        "reStructuredText and text files",
    )
    corpus.add_argument(
        "--texts", type=_count, metavar="N", help="texts of it, with --tokens-per-text"
    )
    parser.add_argument(
        "--tokens-per-text", type=_count, metavar="N", help="of each text, with --texts"
    )
    parser.add_argument(
        "--text-column",
        metavar="NAME",
        help=f"of JSON Lines, the field that is embedded; default: {TEXT_COLUMN}",
    )
    traffic = parser.add_argument_group("queries, on a service that scales to zero")
    traffic.add_argument(
        "--queries-per-day", type=_count, metavar="N", help="on average, evenly spread"
    )
    traffic.add_argument(
        "--scaledown-window",
        type=_window,
        metavar="SECONDS",
        help="that an idle container waits for the next call; default: that of kalm deploy",
    )
    traffic.add_argument(
        "--cold-start",
        type=number(1, 3600),
        metavar="SECONDS",
        help="of a cold start; default: the calculated budget of docs/costs.md",
    )
    add_json(parser)
    parser.set_defaults(run=run, extra="modal")


def run(arguments: argparse.Namespace) -> bool:
    """Print what it costs.

    Args:
        arguments: Those of `add`.

    Returns:
        True: there is nothing that could fail.

    Raises:
        ConfigurationError: An argument cannot be, or does not go with another.
    """
    from kalm_integrations.cost import report
    from kalm_integrations.terminal import write
    from modal_backend import costs
    from modal_backend.settings import DeploySettings

    _check(arguments)
    try:
        choices = costs.choices(arguments.gpu, arguments.quantization)
    except ValueError as error:
        raise ConfigurationError(f"--{error}.") from error
    window = arguments.scaledown_window or DeploySettings.model_fields["scaledown_window"].default
    asked = report.Asked(
        corpus=_corpus(arguments),
        queries_per_day=arguments.queries_per_day,
        window=window,
        start=arguments.cold_start,
        utilization=arguments.utilization,
    )
    shown = report.document if arguments.json else report.text
    write(shown(choices, asked))
    return True


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.texts is None) != (arguments.tokens_per_text is None):
        raise ConfigurationError("--texts and --tokens-per-text go together.")
    check_column(arguments.text_column, arguments.corpus)
    corpus = arguments.tokens or arguments.corpus or arguments.texts
    for name in ("scaledown_window", "cold_start"):
        if getattr(arguments, name) is not None and not (corpus or arguments.queries_per_day):
            option = f"--{name.replace('_', '-')}"
            raise ConfigurationError(f"{option} is for --queries-per-day, or for a corpus.")


def _corpus(arguments: argparse.Namespace) -> Corpus | None:
    from kalm_integrations.cost import corpus

    if arguments.corpus is not None:
        return corpus.of_files(arguments.corpus, arguments.text_column)
    if arguments.texts is not None:
        return corpus.of_texts(arguments.texts, arguments.tokens_per_text)
    return None if arguments.tokens is None else corpus.of_tokens(arguments.tokens)


def _count(value: str) -> int:
    """A number like "500_000", "500,000" or "500k"."""
    found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)([kMB]?)", value)
    count = float(re.sub("[_,]", "", found[1])) * _FACTORS[found[2]] if found else 0.0
    if not (1 <= count <= _MOST and count == round(count)):
        raise argparse.ArgumentTypeError(
            f"{value!r} is not a whole number from 1 to {_MOST:,}, like 500000, 500k, 1.5M or 2B"
        )
    return round(count)


def _window(value: str) -> int:
    from modal_backend.settings import WINDOWS  # the command needs it anyway; others do not

    return number(*WINDOWS)(value)


def _names(value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("it names none")
    return names
