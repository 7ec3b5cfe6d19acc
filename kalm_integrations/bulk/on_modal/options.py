"""The options of `kalm embed` that are about Modal, and what does not go with what."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kalm_integrations.argparsing import number
from kalm_integrations.errors import ConfigurationError

if TYPE_CHECKING:
    from kalm_integrations.argparsing import Parser
    from kalm_integrations.bulk.job_spec import Options
    from kalm_integrations.bulk.on_modal.state import State
    from kalm_integrations.client import KalmClient

ABOUT_A_JOB: Final = ("status", "fetch", "cancel")
_FOR_MODAL: Final = ("max_containers", "detach", "bucket_secret")
_WITH_A_JOB: Final = {"status": {"json"}, "fetch": {"output", "json"}, "cancel": {"json"}}
_ALWAYS: Final = {"verb", "run", "extra"}
_SCHEMES: Final = ("modal://", "s3://")


def add(parser: Parser) -> None:
    """Add the options."""
    modal = parser.add_argument_group(
        "on Modal",
        "Shards run in containers of the app that `kalm deploy` made, in a pool of their own, and "
        "go on when this terminal closes. INPUT may be modal://VOLUME/path or s3://BUCKET/path. "
        "JOB is a job's name, or its --output.",
    )
    modal.add_argument("--on", choices=["modal"], help="where shards are embedded; default: here")
    modal.add_argument(
        "--max-containers",
        type=number(1, 1000),
        metavar="N",
        help="containers that may work at a time; default: 4",
    )
    modal.add_argument("--detach", action="store_true", help="send the job, and wait for nothing")
    modal.add_argument(
        "--bucket-secret", metavar="NAME", help="the Modal Secret that holds the bucket's keys"
    )
    modal.add_argument("--status", metavar="JOB", help="say how far a job is, and what it costs")
    modal.add_argument("--fetch", metavar="JOB", help="download what is finished into --output")
    modal.add_argument(
        "--cancel", metavar="JOB", help="stop a job; the command that began it resumes it"
    )


def check(arguments: argparse.Namespace, parser: Parser) -> None:
    """Refuse options that do not go together.

    Raises:
        ConfigurationError: Some do not; says which.
    """
    given = {
        name
        for name, value in vars(arguments).items()
        if name not in _ALWAYS and value != parser.get_default(name)
    }
    for action in ABOUT_A_JOB:
        if action in given:
            if wrong := sorted(given - {action} - _WITH_A_JOB[action]):
                raise ConfigurationError(f"--{action} does not go with {_option(wrong[0])}.")
            if action == "fetch" and arguments.output is None:
                if Path(arguments.fetch).is_dir():  # which was its --output before
                    arguments.output = arguments.fetch
                    return
                raise ConfigurationError("--fetch needs --output, the folder for the shards.")
            return
    _check_job(arguments, given)


def _check_job(arguments: argparse.Namespace, given: set[str]) -> None:
    if arguments.input is None:
        raise ConfigurationError("INPUT is missing: what is to be embedded.")
    remote = arguments.input.startswith(_SCHEMES)
    if arguments.on is None:
        if wrong := [name for name in _FOR_MODAL if name in given]:
            raise ConfigurationError(f"{_option(wrong[0])} is for --on modal.")
        if remote:
            raise ConfigurationError(f"{arguments.input} can be read with --on modal only.")
    elif arguments.backend not in (None, "modal"):
        raise ConfigurationError(f"--on modal does not go with --backend {arguments.backend}.")
    elif arguments.dry_run and (remote or arguments.detach):
        what = arguments.input if remote else "--detach"
        raise ConfigurationError(f"--dry-run does not go with {what}: it reads on this machine.")
    elif not arguments.dry_run and arguments.gpu is not None:
        raise ConfigurationError("--gpu goes with --dry-run: a job on Modal records its own cost.")
    _check_places(arguments)


def _check_places(arguments: argparse.Namespace) -> None:
    if arguments.bucket_secret is not None and not arguments.input.startswith("s3://"):
        raise ConfigurationError("--bucket-secret is for s3://BUCKET/path.")
    if arguments.output is None and not (arguments.dry_run or arguments.detach):
        raise ConfigurationError("--output names the folder for the shards.")


def concerns(arguments: argparse.Namespace) -> bool:
    """Whether the command is about a job on Modal."""
    return arguments.on is not None or any(getattr(arguments, name) for name in ABOUT_A_JOB)


def run(arguments: argparse.Namespace, client: KalmClient, options: Options) -> str:
    """Do what is asked; what is to be printed.

    Raises:
        KalmError: See `kalm_integrations.bulk.on_modal.command`.
    """
    from kalm_integrations.bulk.on_modal import command
    from kalm_integrations.bulk.on_modal.status_view import Screen

    screen = Screen()
    try:
        if arguments.status:
            name, state, alive = command.status(arguments.status, client)
            return command.said(name, state, alive=alive, as_json=arguments.json)
        if arguments.cancel:
            name, state = command.cancel(arguments.cancel, client)
            return command.said(name, state, alive=False, as_json=arguments.json)
        if arguments.fetch:
            name, state = command.fetch(arguments.fetch, Path(arguments.output), client, screen)
        else:
            name, state = command.embed(arguments, client, options, screen)
    finally:
        screen.close()
    return _outcome(name, state, arguments)


def _outcome(name: str, state: State | None, arguments: argparse.Namespace) -> str:
    from kalm_integrations.bulk.progress import outcome

    if state is None:
        return json.dumps({"job": name}, indent=2) if arguments.json else name
    folder = Path(arguments.output)
    more: dict[str, Any] = {"job": name, "complete": state.complete}
    said = outcome(state.manifest(), folder, as_json=arguments.json, more=more)
    if not state.complete and not arguments.json:
        said += f"\n{name} is not finished: {len(state.finished):,} of {state.total:,} shards"
    return said


def _option(name: str) -> str:
    return "INPUT" if name == "input" else f"--{name.replace('_', '-')}"
