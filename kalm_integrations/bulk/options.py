"""The job that `kalm embed` runs, its dry run, and what it prints at the end."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kalm_integrations.errors import ConfigurationError

if TYPE_CHECKING:
    from kalm_integrations.bulk.job_spec import Options
    from kalm_integrations.bulk.on_modal.state import State
    from kalm_integrations.bulk.scan import Scan
    from kalm_integrations.cli.embed import EmbedOptions
    from kalm_integrations.client import KalmClient
    from modal_backend.costs import Choice

_ABOUT_A_JOB: Final = ("status", "fetch", "cancel")


def run(source: str | None, chosen: EmbedOptions) -> str:
    """Embed, or say what would be; return what to print.

    Raises:
        KalmError: See `embed_corpus`.
        ConfigurationError: An argument cannot be.
    """
    from kalm_integrations.bulk.job import embed_corpus, estimate
    from kalm_integrations.bulk.job_spec import SHARD_ROWS, Options
    from kalm_integrations.bulk.progress import Progress, outcome
    from kalm_integrations.client import KalmClient

    arguments = Namespace(**asdict(chosen), input=source)
    elsewhere = arguments.on or any(getattr(arguments, name) for name in _ABOUT_A_JOB)
    if elsewhere:
        arguments.backend = "modal"
        arguments.output = arguments.output or arguments.fetch
        if arguments.dry_run and arguments.gpu is None:
            from modal_backend.settings import DeploySettings

            (arguments.gpu,) = DeploySettings.model_fields["gpu"].default
    gpu = _gpu(arguments)
    given = {name: getattr(arguments, name) for name in ("backend", "vector_dtype", "dimensions")}
    options = Options(
        text_column=arguments.text_column,
        id_column=arguments.id_column,
        on_error=arguments.on_error,
        shard_rows=arguments.shard_rows or SHARD_ROWS,
        dollars_per_second=gpu.dollars if gpu else None,
    )
    screen = Progress(options.dollars_per_second)
    try:
        with KalmClient(**{name: value for name, value in given.items() if value}) as client:
            if elsewhere and not arguments.dry_run:
                return _on_modal(arguments, client, options)
            if arguments.dry_run:
                counting = replace(options, on_error="skip")  # bad rows are a part of the answer
                found = estimate(arguments.input, client, counting, screen)
                said = _forecast(found, client, options, gpu, elsewhere)
                if arguments.json:
                    return json.dumps(said, indent=2)
                return _forecast_text(said, found, options.on_error)
            done = embed_corpus(arguments.input, arguments.output, client, options, screen)
            return outcome(done, Path(arguments.output), as_json=arguments.json)
    finally:
        screen.close()


def _on_modal(arguments: Namespace, client: KalmClient, options: Options) -> str:
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


def _outcome(name: str, state: State | None, arguments: Namespace) -> str:
    from kalm_integrations.bulk.progress import outcome

    if state is None:
        return json.dumps({"job": name}, indent=2) if arguments.json else name
    folder = Path(arguments.output)
    more: dict[str, Any] = {"job": name, "complete": state.complete}
    said = outcome(state.manifest(), folder, as_json=arguments.json, more=more)
    if not state.complete and not arguments.json:
        said += f"\n{name} is not finished: {len(state.finished):,} of {state.total:,} shards"
    return said


def _gpu(arguments: Namespace) -> Choice | None:
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


def _forecast(
    found: Scan, client: KalmClient, options: Options, gpu: Choice | None, elsewhere: bool
) -> dict[str, Any]:
    bytes_each = {"float16": 2, "float32": 4}[client.config.vector_dtype]
    kept = found.rows - (found.bad if options.on_error == "skip" else 0)
    said: dict[str, Any] = {
        "rows": found.rows,
        "texts": found.distinct,
        "copies": found.rows - found.bad - found.distinct,
        "bad_rows": found.bad,
        "tokens": found.tokens,
        "shards": -(-found.rows // options.shard_rows),
        "vector_bytes": kept * client.vector_dimensions * bytes_each or None,
    }
    if gpu is not None:
        from modal_backend import gpus
        from modal_backend.settings import DeploySettings

        window = DeploySettings.model_fields["scaledown_window"].default
        job = gpu.job(found.tokens, window, gpus.SNAPSHOT_START)
        said |= {
            "gpu": gpu.gpu,
            "tokens_per_second": gpu.rate.tokens,
            "measured": gpu.rate.measured,
            "hours": job.hours,
            "dollars": job.dollars,
        }
        if elsewhere:
            from kalm_integrations.bulk.on_modal.forecast import forecasts

            del said["hours"], said["dollars"]
            said["on_modal"] = forecasts(gpu, found.tokens, said["shards"])
    return said


def _forecast_text(said: dict[str, Any], found: Scan, on_error: str) -> str:
    lines = [
        f"{said['rows']:,} rows: {said['texts']:,} texts to embed, {said['copies']:,} copies, "
        f"{said['bad_rows']:,} that cannot be embedded",
        f"about {said['tokens']:,} tokens (estimated, 4 bytes a token)",
    ]
    if found.bad and on_error == "fail":
        lines.append(f"--on-error fail would refuse them: {'; '.join(found.examples)}")
    if said["vector_bytes"]:
        from kalm_integrations.bulk.progress import counted

        gib = said["vector_bytes"] / 2**30
        lines.append(f"{gib:,.2f} GiB of vectors, in {counted(said['shards'], 'shard')}")
    if "on_modal" in said:
        from kalm_integrations.bulk.on_modal.forecast import as_text
        from kalm_integrations.bulk.on_modal.worker_pool import SCALEDOWN_WINDOW

        how = "measured" if said["measured"] else "calculated"
        lines.append(
            f"on Modal, on {said['gpu']} ({said['tokens_per_second']:,.0f} tokens/s, {how}), with "
            "the load of the model in each container; the price includes "
            f"{SCALEDOWN_WINDOW} s of idle time at the end:"
        )
        lines += as_text(said["on_modal"])
    elif "gpu" in said:
        from kalm_integrations.bulk.progress import duration

        how = "measured" if said["measured"] else "calculated"
        lines.append(
            f"about {duration(3600 * said['hours'])} and ${said['dollars']:,.2f} on one "
            f"{said['gpu']} ({said['tokens_per_second']:,.0f} tokens/s, {how}), a service's start "
            "included; the price includes its idle time at the end"
        )
    else:
        lines.append("--gpu NAME adds time and cost; `kalm cost` compares GPUs")
    return "\n".join(lines)
