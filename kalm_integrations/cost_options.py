"""The options of `kalm cost`."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Final

from kalm_integrations.argparsing import add_json, number, path, share

if TYPE_CHECKING:
    from kalm_integrations.argparsing import Verbs

_FACTORS: Final = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
_MAXIMUM: Final = 10**15


def add(verbs: Verbs) -> None:
    """Add the command."""
    parser = verbs.add_parser(
        "cost",
        help="what KaLM costs on each GPU: a million tokens, your corpus, your traffic",
        description="Show what KaLM costs on each of Modal's GPUs, as `kalm deploy` deploys it, "
        "and what each figure is based on. Needs no network and starts nothing. N may end in k, M "
        "or B.",
    )
    parser.add_argument("--gpu", type=_names, default=(), metavar="GPU,GPU", help="only these")
    parser.add_argument("--quantization", choices=["none", "fp8"], help="only this one")
    parser.add_argument(
        "--utilization",
        type=share,
        default=0.6,
        metavar="SHARE",
        help="share of a container's billed time in which it computes; default: %(default)s",
    )
    corpus = parser.add_argument_group("a corpus").add_mutually_exclusive_group()
    corpus.add_argument("--tokens", type=_count, metavar="N", help="number of tokens")
    corpus.add_argument(
        "--corpus", type=path, metavar="PATH", help="count them: a file or folder of `kalm embed`"
    )
    parser.add_argument("--text-column", metavar="NAME", help="the text; default: text")
    traffic = parser.add_argument_group("queries, on a service that scales to zero")
    traffic.add_argument("--queries-per-day", type=_count, metavar="N", help="average")
    traffic.add_argument(
        "--scaledown-window",
        type=_window,
        metavar="SECONDS",
        help="idle time before a container stops; default: as for kalm deploy",
    )
    traffic.add_argument(
        "--cold-start",
        type=number(1, 3600),
        metavar="SECONDS",
        help="of a start, instead of the documented ones",
    )
    add_json(parser)
    parser.set_defaults(run=run, extra="bulk")


def run(arguments: argparse.Namespace) -> bool:
    """Run the command; True, as there is no check that could fail."""
    from kalm_integrations import cost

    names = [name for name in cost.CostOptions.__dataclass_fields__ if name != "as_json"]
    options = {name: getattr(arguments, name) for name in names}
    cost.run(cost.CostOptions(**options, as_json=arguments.json))
    return True


def _count(value: str) -> int:
    """A number like "500_000", "500,000" or "500k"."""
    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)([kMB]?)", value)
    count = float(re.sub("[_,]", "", match[1])) * _FACTORS[match[2]] if match else 0.0
    if not (1 <= count <= _MAXIMUM and count == round(count)):
        raise argparse.ArgumentTypeError(
            f"{value!r} is not a whole number from 1 to {_MAXIMUM:,}, like 500000, 500k, 1.5M or 2B"
        )
    return round(count)


def _window(value: str) -> int:
    from modal_backend.settings import WINDOWS

    return number(*WINDOWS)(value)


def _names(value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("it names none")
    return names
