"""What `kalm embed` does with its options: a job, its dry run, its status."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pyarrow as pa

from kalm_integrations.bulk import forecast
from kalm_integrations.bulk.job import embed_corpus, plan_input
from kalm_integrations.bulk.manifest import Manifest
from kalm_integrations.bulk.plan import SHARD_ROWS, Options
from kalm_integrations.bulk.progress import ProgressView, outcome
from kalm_integrations.client import KalmClient
from kalm_integrations.errors import ConfigurationError, KalmError, TransportError
from kalm_integrations.terminal import write

if TYPE_CHECKING:
    from kalm_integrations.cli.embed import EmbedOptions
    from modal_backend.costs import Choice

LIMIT_REACHED: Final = 3
"""Exit status of a job that was stopped by --max-dollars or --max-hours."""


def run(source: str | None, chosen: EmbedOptions) -> int:
    """Run the command. Returns its exit status.

    Raises:
        KalmError: See `embed_corpus`.
        KeyboardInterrupt: With a message that says what is finished.
    """
    arguments = Namespace(**asdict(chosen), input=source)
    if _concerns_modal(arguments):
        arguments.backend = "modal"
        arguments.output = arguments.output or arguments.fetch
    gpu = _gpu(arguments)
    view = ProgressView(gpu.dollars if gpu else None)
    try:
        return _run(arguments, gpu, view)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(_finished(arguments)) from interrupt
    except (KalmError, OSError, ImportError):
        raise
    except pa.ArrowException as error:
        raise TransportError(f"{type(error).__name__}: {error}.") from error
    finally:
        view.close()


def _run(arguments: Namespace, gpu: Choice | None, view: ProgressView) -> int:
    options = Options(
        text_column=arguments.text_column,
        id_column=arguments.id_column,
        on_error=arguments.on_error,
        shard_rows=arguments.shard_rows or SHARD_ROWS,
        encoding=arguments.encoding,
        allow_duplicate_ids=arguments.allow_duplicate_ids,
        vector_column=arguments.vector_column,
        replace_vector=arguments.replace_vector,
        reuse=arguments.reuse,
        dollars_per_second=gpu.dollars if gpu else None,
        max_dollars=arguments.max_dollars,
        max_hours=arguments.max_hours,
    )
    with _client(arguments) as client:
        if arguments.dry_run:
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
        f"finished. Run the same command with a higher {reached}, or without it, to resume.",
        sys.stderr,
    )
    return LIMIT_REACHED


def _client(arguments: Namespace) -> KalmClient:
    names = ("backend", "vector_dtype", "dimensions")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    try:
        return KalmClient(**options)
    except ConfigurationError:
        if not arguments.dry_run or "backend" in options:
            raise
        return KalmClient(**{**options, "backend": "modal"})  # which a dry run does not call


def _finished(arguments: Namespace) -> str:
    if arguments.dry_run:
        return "interrupted."
    if _concerns_modal(arguments):
        return "interrupted; a submitted job continues. Run the same command again to follow it."
    try:
        manifest = Manifest.read(Path(arguments.output))
    except KalmError:
        manifest = None
    count = "0"
    if manifest is not None:
        count = f"{manifest.rows:,} of {manifest.job.rows:,}"
    return f"interrupted: {count} rows are finished. Run the same command again to resume."


def _gpu(arguments: Namespace) -> Choice | None:
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


def _concerns_modal(arguments: Namespace) -> bool:
    return any((arguments.on, arguments.status, arguments.fetch, arguments.cancel))
