"""`kalm embed`: its options, what does not go with what, and its dry run."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kalm_integrations.argparsing import add_json, number
from kalm_integrations.errors import ConfigurationError, KalmError, TransportError

if TYPE_CHECKING:
    from kalm_integrations.argparsing import Parser, Verbs
    from kalm_integrations.client import KalmClient
    from modal_backend.costs import Choice

LIMIT_REACHED: Final = 3
"""Exit status of a job that was stopped by --max-dollars or --max-hours."""
_JOB_ACTIONS: Final = {"status": {"json"}, "fetch": {"output", "json"}, "cancel": {"json"}}
_FOR_MODAL: Final = ("max_containers", "detach", "bucket_secret")
_NOT_OPTIONS: Final = {"verb", "run", "extra"}


def add(verbs: Verbs) -> None:
    """Add the command."""
    parser = verbs.add_parser(
        "embed",
        help="embed a corpus into Parquet; resumes where it was interrupted",
        description="Embed a corpus into shards of Parquet with fixed-size vectors. Run the same "
        "command again to resume, however it was interrupted. Services and keys are read from "
        "KALM_* variables.",
    )
    parser.add_argument(
        "input",
        metavar="INPUT",
        nargs="?",
        help="Parquet, JSON Lines, CSV (*.csv, *.tsv), text (*.txt, one text a line; *.md and "
        "*.rst, one text a file), a folder of such files, a glob in quotes, or an address such as "
        "s3://BUCKET/path that fsspec reads",
    )
    option = parser.add_argument
    option("--output", metavar="DIR", help="folder for the shards; required unless --dry-run")
    option("--text-column", metavar="NAME", help="column that is embedded; default: text")
    option("--id-column", metavar="NAME", help="column used as the document ID")
    option("--allow-duplicate-ids", action="store_true", help="accept an ID more than once")
    option("--encoding", metavar="NAME", help="of CSV and text files; default: utf-8")
    option(
        "--on-error",
        choices=["fail", "skip", "null"],
        default="fail",
        help="for rows that cannot be embedded: fail before anything is sent, skip them, or keep "
        "them with a null vector; skipped and null ones are listed in rejected.parquet. "
        "Default: %(default)s",
    )
    option("--backend", choices=["auto", "local", "http", "modal"], help="where vectors come from")
    option("--vector-column", metavar="NAME", help="column for the vectors; default: vector")
    option("--replace-vector", action="store_true", help="drop the input's column of that name")
    option("--vector-dtype", choices=["float16", "float32"], help="default: float16")
    option("--dimensions", type=number(1), metavar="N", help="of the vectors")
    option(
        "--shard-rows",
        type=number(1),
        metavar="N",
        help="input rows of each shard, of which three are in memory; default: 8192",
    )
    option(
        "--reuse",
        metavar="DIR",
        action="append",
        help="take the vectors of texts that this complete output has; may be given several times",
    )
    option("--gpu", metavar="GPU", help="GPU of the service, to show what the job costs")
    option("--quantization", choices=["none", "fp8"], default="none", help="of the service")
    option("--max-dollars", type=_amount, metavar="N", help="stop before the job costs more")
    option("--max-hours", type=_amount, metavar="N", help="stop before the job takes longer")
    option("--dry-run", action="store_true", help="show size and cost; send nothing")
    add_json(parser)
    modal = parser.add_argument_group(
        "on Modal",
        "Shards are embedded in containers of the app that `kalm deploy` made, also when this "
        "terminal is closed. INPUT may be modal://VOLUME/path or s3://BUCKET/path. JOB is a job's "
        "name, or its --output.",
    )
    option = modal.add_argument
    option("--on", choices=["modal"], help="where shards are embedded; default: here")
    option("--max-containers", type=number(1, 1000), metavar="N", help="default: 4")
    option("--detach", action="store_true", help="send the job, and do not wait for it")
    option("--bucket-secret", metavar="NAME", help="Modal Secret with the bucket's keys")
    option("--status", metavar="JOB", help="show how far a job is, and what it costs")
    option("--fetch", metavar="JOB", help="download what is finished into --output")
    option("--cancel", metavar="JOB", help="stop a job; the same command resumes it")
    parser.set_defaults(run=partial(run, parser=parser), extra="bulk")


def _amount(value: str) -> float:
    try:
        amount = float(value)
    except ValueError:
        amount = 0.0
    if not 0 < amount < float("inf"):
        raise argparse.ArgumentTypeError(f"{value!r} is not a number above 0")
    return amount


def run(arguments: argparse.Namespace, parser: Parser) -> int:
    """Run the command.

    Args:
        arguments: Those of `add`.
        parser: That has read them.

    Returns:
        The exit status.

    Raises:
        KalmError: See `embed_corpus`.
    """
    _check(arguments, parser)
    import pyarrow as pa

    from kalm_integrations.bulk.progress import ProgressView

    gpu = _gpu(arguments)
    view = ProgressView(gpu.dollars if gpu else None)
    try:
        return _run(arguments, gpu, view)
    except KeyboardInterrupt:
        view.close()
        _interrupted(arguments)
        raise
    except pa.ArrowException as error:
        raise TransportError(f"{type(error).__name__}: {error}.") from error
    except (KalmError, OSError, ImportError):
        raise
    except Exception as error:
        raise TransportError(f"{type(error).__name__}: {error}.") from error
    finally:
        view.close()


def _run(arguments: argparse.Namespace, gpu: Choice | None, view: Any) -> int:
    from kalm_integrations.bulk.job import embed_corpus, plan_input
    from kalm_integrations.bulk.plan import SHARD_ROWS, Options
    from kalm_integrations.bulk.progress import outcome
    from kalm_integrations.terminal import write

    options = Options(
        text_column=arguments.text_column,
        id_column=arguments.id_column,
        on_error=arguments.on_error,
        shard_rows=arguments.shard_rows or SHARD_ROWS,
        encoding=arguments.encoding,
        allow_duplicate_ids=arguments.allow_duplicate_ids,
        vector_column=arguments.vector_column or "vector",
        replace_vector=arguments.replace_vector,
        reuse=tuple(arguments.reuse or ()),
        dollars_per_second=gpu.dollars if gpu else None,
        max_dollars=arguments.max_dollars,
        max_hours=arguments.max_hours,
    )
    with _client(arguments) as client:
        if arguments.dry_run:
            from kalm_integrations.bulk import forecast

            output = Path(arguments.output) if arguments.output else None
            plan = plan_input(arguments.input, client, options, view, output, refuse_bad=False)
            write(forecast.shown(plan, client, gpu, arguments))
            return 0
        if _concerns_modal(arguments):
            from kalm_integrations.bulk.on_modal import command

            manifest, text = command.run(arguments, client, options, view)
        else:
            folder = Path(arguments.output)
            manifest = embed_corpus(arguments.input, folder, client, options, view)
            text = outcome(manifest, folder, as_json=arguments.json)
    view.close()
    write(text)
    if manifest is None or manifest.complete or not (options.max_dollars or options.max_hours):
        return 0
    reached = "--max-dollars" if options.max_dollars else "--max-hours"
    write(
        f"kalm embed: stopped at {reached}: {manifest.rows:,} of {manifest.job.rows:,} rows are "
        f"finished. Run the same command with a higher {reached}, or without it, to go on.",
        sys.stderr,
    )
    return LIMIT_REACHED


def _client(arguments: argparse.Namespace) -> KalmClient:
    from kalm_integrations.client import KalmClient

    names = ("backend", "vector_dtype", "dimensions")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    try:
        return KalmClient(**given)
    except ConfigurationError:
        if not arguments.dry_run or "backend" in given:
            raise
        return KalmClient(**given, backend="modal")  # which a dry run does not call


def _interrupted(arguments: argparse.Namespace) -> None:
    from kalm_integrations.bulk.manifest import Manifest
    from kalm_integrations.terminal import write

    manifest = None
    if arguments.output and not arguments.on:
        try:
            manifest = Manifest.read(Path(arguments.output))
        except KalmError:
            manifest = None
    done = "0 rows are finished"
    if manifest is not None:
        done = f"{manifest.rows:,} of {manifest.job.rows:,} rows are finished"
    message = f"interrupted: {done}. Run the same command again to resume."
    if arguments.on or arguments.status or arguments.fetch or arguments.cancel:
        message = "interrupted: a job that was sent goes on. Run the same command again to see it."
    if arguments.dry_run:
        message = "interrupted."
    write(f"kalm embed: {message}", sys.stderr)
    if arguments.json:
        error = {"code": "interrupted", "message": message, "remedy": "", "exit_status": 130}
        write(json.dumps({"error": error}, indent=2))


def _gpu(arguments: argparse.Namespace) -> Choice | None:
    if arguments.gpu is None and arguments.on and arguments.dry_run:
        from modal_backend.settings import DeploySettings

        (arguments.gpu,) = DeploySettings.model_fields["gpu"].default
    if arguments.gpu is None:
        return None
    from modal_backend import costs

    try:
        (choice,) = costs.choices([arguments.gpu], arguments.quantization)
    except ValueError as error:
        raise ConfigurationError(f"--{error}.") from error
    if choice.problem:
        raise ConfigurationError(f"--gpu {arguments.gpu}: {choice.problem}.")
    return choice


def _concerns_modal(arguments: argparse.Namespace) -> bool:
    return bool(arguments.on) or any(getattr(arguments, name) for name in _JOB_ACTIONS)


def _check(arguments: argparse.Namespace, parser: Parser) -> None:
    """Refuse options that do not go together."""
    given = {
        name
        for name, value in vars(arguments).items()
        if name not in _NOT_OPTIONS and value != parser.get_default(name)
    }
    for action, allowed in _JOB_ACTIONS.items():
        if action in given:
            if wrong := sorted(given - {action} - allowed):
                raise ConfigurationError(f"--{action} does not go with {_named(wrong[0])}.")
            if action == "fetch" and arguments.output is None:
                if not Path(arguments.fetch).is_dir():  # which was its --output before
                    raise ConfigurationError("--fetch needs --output, the folder for the shards.")
                arguments.output = arguments.fetch
            arguments.backend = "modal"
            return
    source = arguments.input
    if source is None:
        raise ConfigurationError("INPUT is missing: the file or folder to embed.")
    on_modal, dry_run = arguments.on is not None, arguments.dry_run
    remote = source.startswith(("modal://", "s3://"))
    first_for_modal = next((name for name in _FOR_MODAL if name in given), "")
    rules = [
        (not on_modal and first_for_modal, f"{_named(first_for_modal)} is for --on modal."),
        (
            not on_modal and source.startswith("modal://"),
            f"{source} can be read with --on modal only.",
        ),
        (
            on_modal and arguments.backend not in (None, "modal"),
            f"--on modal does not go with --backend {arguments.backend}.",
        ),
        (
            on_modal and dry_run and (remote or arguments.detach),
            f"--dry-run does not go with {source if remote else '--detach'}: it reads here.",
        ),
        (
            on_modal and not dry_run and arguments.gpu is not None,
            "--gpu goes with --dry-run: a job on Modal records its own cost.",
        ),
        (
            arguments.bucket_secret is not None and not source.startswith("s3://"),
            "--bucket-secret is for s3://BUCKET/path.",
        ),
        (
            on_modal and remote and arguments.reuse,
            f"--reuse does not go with {source}: it reads here.",
        ),
        (
            arguments.output is None and not (dry_run or arguments.detach),
            "--output names the folder for the shards.",
        ),
    ]
    for broken, message in rules:
        if broken:
            raise ConfigurationError(message)
    if on_modal:
        arguments.backend = "modal"


def _named(name: str) -> str:
    return "INPUT" if name == "input" else f"--{name.replace('_', '-')}"
