"""What `kalm embed` does with its options: a job, its dry run, its status."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pyarrow as pa

from kalm_integrations.bulk import forecast
from kalm_integrations.bulk.job import embed_corpus, estimate
from kalm_integrations.bulk.manifest import Manifest
from kalm_integrations.bulk.options import Options
from kalm_integrations.bulk.progress import ProgressView, outcome
from kalm_integrations.client import KalmClient
from kalm_integrations.errors import ConfigurationError, KalmError, TransportError
from kalm_integrations.terminal import write

if TYPE_CHECKING:
    from kalm_integrations.cli.embed import EmbedOptions
    from kalm_integrations.models import Quantization
    from modal_backend.costs import Choice

LIMIT_REACHED: Final = 3
"""Exit status of a job that was stopped by --max-dollars or --max-hours."""


def run(source: str | None, chosen: EmbedOptions) -> int:
    """Run the command. Returns its exit status.

    Raises:
        KalmError: See `embed_corpus`.
        KeyboardInterrupt: With a message that says what is finished.
    """
    gpu_name = chosen.gpu
    if gpu_name is None and chosen.on and chosen.dry_run:
        from modal_backend.settings import DeploySettings

        (gpu_name,) = DeploySettings.model_fields["gpu"].default
    gpu = _gpu(gpu_name, chosen.quantization) if gpu_name else None
    if _concerns_modal(chosen):
        chosen = replace(chosen, backend="modal", output=chosen.output or chosen.fetch)
    view = ProgressView(gpu.dollars if gpu else None)
    try:
        return _run(source, chosen, gpu, view)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(_finished(chosen)) from interrupt
    except pa.ArrowException as error:
        raise TransportError(f"{type(error).__name__}: {error}.") from error
    finally:
        view.close()


def _run(source: str | None, chosen: EmbedOptions, gpu: Choice | None, view: ProgressView) -> int:
    given = {name: getattr(chosen, name, None) for name in Options.__dataclass_fields__}
    given["dollars_per_second"] = gpu.dollars if gpu else None
    options = Options(**{name: value for name, value in given.items() if value is not None})
    with _client(chosen) as client:
        if chosen.dry_run:
            output = Path(str(chosen.output)) if chosen.output else None
            plan = estimate(str(source), client, options, view, output, refuse_bad=False)
            on_modal = chosen.on is not None
            write(forecast.shown(plan, client, gpu, on_modal=on_modal, as_json=chosen.json))
            return 0
        if _concerns_modal(chosen):
            from kalm_integrations.bulk.on_modal import command

            manifest, text = command.run(source, chosen, client, options, view)
        else:
            folder = Path(str(chosen.output))
            manifest = embed_corpus(str(source), folder, client, options, view)
            text = outcome(manifest, folder, as_json=chosen.json)
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


def _client(chosen: EmbedOptions) -> KalmClient:
    names = ("backend", "vector_dtype", "dimensions")
    options = {name: getattr(chosen, name) for name in names if getattr(chosen, name)}
    try:
        return KalmClient(**options)
    except ConfigurationError:
        if not chosen.dry_run or "backend" in options:
            raise
        return KalmClient(**{**options, "backend": "modal"})  # which a dry run does not call


def _finished(chosen: EmbedOptions) -> str:
    if chosen.dry_run:
        return "interrupted."
    if _concerns_modal(chosen):
        return "interrupted; a submitted job continues. Run the same command again to follow it."
    try:
        manifest = Manifest.read(Path(str(chosen.output)))
    except KalmError:
        manifest = None
    count = "0"
    if manifest is not None:
        count = f"{manifest.rows:,} of {manifest.job.rows:,}"
    return f"interrupted: {count} rows are finished. Run the same command again to resume."


def _gpu(name: str, quantization: Quantization) -> Choice:
    from modal_backend import costs

    try:
        (choice,) = costs.choices([name], quantization)
    except ValueError as error:
        raise ConfigurationError(f"--{error}.") from error
    if choice.problem:
        raise ConfigurationError(f"--gpu {name}: {choice.problem}.")
    return choice


def _concerns_modal(chosen: EmbedOptions) -> bool:
    return any((chosen.on, chosen.status, chosen.fetch, chosen.cancel))
