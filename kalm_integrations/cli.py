"""The command `kalm`: docs/cli.md has its commands, exit statuses and JSON."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import kalm_integrations
from kalm_integrations import cost, deploy_options, evaluation, serve_options
from kalm_integrations.argparsing import Parser, UsageError, add_json, path
from kalm_integrations.bulk import options as bulk_options
from kalm_integrations.errors import (
    ConfigurationError,
    InvalidInputError,
    KalmError,
    NotDeployedError,
)
from kalm_integrations.install_hints import install_command

if TYPE_CHECKING:
    from kalm_integrations.argparsing import Verbs

FAILED: Final = 1
WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130  # 128 and the number of the signal, as shells count
NOBODY_READS: Final = 141


class Failure(NamedTuple):
    """What ends a command before it has done its work."""

    status: int
    command: str
    code: str
    message: str
    remedy: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: Of status 0 by `--help` and `--version`, of 143 by SIGTERM to `kalm serve`.
    """
    _prepare_streams()
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # here, where it can still be told that nobody reads
    except BrokenPipeError:
        _discard_output()
        return NOBODY_READS
    except OSError as error:  # a full disk
        _discard_output()
        sys.stderr.write(f"kalm: the output cannot be written: {error.strerror}.\n")
        return FAILED
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # rich's way to say so
            return NOBODY_READS
        raise
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(argv: Sequence[str]) -> int:
    arguments = argparse.Namespace(verb="", extra="")
    try:
        _parser().parse_args(argv, arguments)
        status = arguments.run(arguments)
        return int(not status) if isinstance(status, bool) else int(status)
    except BrokenPipeError:
        raise
    except (UsageError, KalmError, ImportError, OSError) as error:
        failure = _explained(error, arguments)
    sys.stderr.write(f"{failure.command}: {failure.message} {failure.remedy}".strip() + "\n")
    if "--json" in argv:  # also where the arguments were not understood
        said = {name: getattr(failure, name) for name in ("code", "message", "remedy")}
        content = {"error": said | {"exit_status": failure.status}}
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    return failure.status


def _explained(
    error: UsageError | KalmError | ImportError | OSError, arguments: argparse.Namespace
) -> Failure:
    command = f"kalm {arguments.verb}".strip()
    if isinstance(error, UsageError):
        command = error.command
        failure = (WRONG_USAGE, command, ConfigurationError.code, str(error), "")
    elif isinstance(error, KalmError):
        wrong = isinstance(error, ConfigurationError | InvalidInputError)
        status = WRONG_USAGE if wrong else FAILED
        said = error.message
        remedy = _on_the_command_line(error)
        failure = (status, command, error.code, said, remedy)
    elif isinstance(error, ImportError):
        install = install_command(arguments.extra)
        remedy = f"This command needs more: {install}"
        failure = (FAILED, command, "missing_package", str(error), remedy)
    else:
        named = f"{error.filename}: " if error.filename else ""
        failure = (FAILED, command, "os_error", f"{named}{error.strerror or error}", "")
    made = Failure(*failure)
    if made.code == ConfigurationError.code and made.remedy in ("", ConfigurationError.remedy):
        # whose own remedy speaks of docstrings
        made = made._replace(remedy=f"`{command} --help` lists what it takes.")
    ended = made.message.endswith((".", "?", "!"))
    return made if ended else made._replace(message=f"{made.message}.")


def _on_the_command_line(error: KalmError) -> str:
    """The error's remedy, with variables where its own names arguments of Python."""
    if isinstance(error, NotDeployedError):
        from kalm_integrations.doctor.checks import NOT_DEPLOYED

        return NOT_DEPLOYED
    return error.remedy


def _prepare_streams() -> None:
    """Have all three, and have them show every character in some way."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us, as `>&-` does
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal can show every character
            stream.reconfigure(errors="replace")


def _discard_output() -> None:
    """Or Python, which writes the rest of it when it ends, would complain of the same again."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _parser() -> Parser:
    parser = Parser(
        prog="kalm",
        usage="kalm [-h] [--version] COMMAND ...",
        description="KaLM embeddings for LangChain, LlamaIndex and numpy.",
        epilog="kalm COMMAND --help lists a command's options. Services and keys are read from "
        "KALM_* variables. Exit status: 0 fine, 1 failed or found a problem, 2 wrong usage, "
        "130 interrupted.",
    )
    version = f"kalm-integrations {kalm_integrations.__version__}"
    parser.add_argument("--version", action="version", version=version, help="show the version")
    verbs = parser.add_subparsers(
        title="commands", dest="verb", metavar="COMMAND", required=True, prog="kalm"
    )
    for add in VERBS:
        add(verbs)
    return parser


def _add_quickstart(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "quickstart",
        help="index real text in two frameworks, and ask it a few questions",
        description="Index real text in a vector store through LangChain and through LlamaIndex, "
        "with the embedded engine, and ask it a few questions.",
    )
    parser.add_argument(
        "--corpus",
        type=path,
        metavar="PATH",
        help="a folder of Markdown, reStructuredText and text files; "
        "without it, the docstrings of Python's standard library",
    )
    parser.add_argument(
        "--question", metavar="TEXT", help="ask this, instead of questions of the texts' own"
    )
    parser.set_defaults(run=_quickstart, extra="quickstart")


def _quickstart(arguments: argparse.Namespace) -> bool:
    from kalm_integrations.quickstart import run

    return run(arguments.corpus, arguments.question)


def _add_doctor(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "doctor",
        help="check settings, keys and the service, and tell you how to fix them",
        description="Check what an application with these KALM_* variables would meet, and "
        "tell you how to fix it. Starts no container, unless told to. Exit status: 1 if a check "
        "failed.",
    )
    parser.add_argument(
        "--wake",
        action="store_true",
        help="have the service embed, even where that starts a container, which costs money",
    )
    parser.add_argument(
        "--golden",
        action="store_true",
        help="--wake, and compare KaLM's vectors of a few texts with what they must be",
    )
    add_json(parser)
    parser.set_defaults(run=_doctor, extra="modal")


def _doctor(arguments: argparse.Namespace) -> bool:
    from kalm_integrations.doctor import run

    return run(wake=arguments.wake, reference=arguments.golden, as_json=arguments.json)


VERBS: Final[tuple[Callable[[Verbs], None], ...]] = (
    _add_quickstart,
    serve_options.add,
    deploy_options.add,
    _add_doctor,
    bulk_options.add,
    cost.add,
    evaluation.add,
)
"""Each adds a command with its defaults: what to `run`, which says whether all went well, and
the `extra` that it needs."""


if __name__ == "__main__":
    sys.exit(main())
