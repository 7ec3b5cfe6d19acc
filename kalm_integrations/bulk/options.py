"""`kalm embed`: its options, its dry run, and what it says at the end."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalm_integrations.argparsing import add_json, number
from kalm_integrations.bulk.on_modal import options as on_modal
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.lines import TEXT_COLUMN

if TYPE_CHECKING:
    from kalm_integrations.argparsing import Parser, Verbs
    from kalm_integrations.bulk.job_spec import Options
    from kalm_integrations.bulk.scan import Scan
    from kalm_integrations.client import KalmClient
    from modal_backend.costs import Choice


def add(verbs: Verbs) -> None:
    """Add the command."""
    parser = verbs.add_parser(
        "embed",
        help="embed a corpus into Parquet, from where it was interrupted",
        description="Embed a corpus into shards of Parquet with fixed-size vectors. The same "
        "command goes on where it was interrupted, however that happened. Services and keys are "
        "read from KALM_* variables.",
    )
    parser.add_argument(
        "input",
        metavar="INPUT",
        nargs="?",
        help="Parquet, JSON Lines, CSV (*.csv, *.tsv), text (*.txt, one text a line; *.md and "
        "*.rst, one text a file), a folder of such files, or a glob in quotes",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder for the shards; needed without --dry-run"
    )
    parser.add_argument(
        "--text-column", metavar="NAME", help=f"what is embedded; default: {TEXT_COLUMN}"
    )
    parser.add_argument("--id-column", metavar="NAME", help="what names a row to a store")
    parser.add_argument(
        "--on-error",
        choices=["fail", "skip", "null"],
        default="fail",
        help="of rows that cannot be embedded: fail before anything is sent, skip them, or keep "
        "them with a null vector; skipped and null ones are in rejected.parquet. "
        "Default: %(default)s",
    )
    parser.add_argument(
        "--backend",
        choices=["auto", "local", "http", "modal"],
        help="where vectors come from; default: KALM_BACKEND, else what is configured",
    )
    parser.add_argument(
        "--vector-dtype", choices=["float16", "float32"], help="of the vectors; default: float16"
    )
    parser.add_argument("--dimensions", type=number(1), metavar="N", help="of the vectors")
    parser.add_argument(
        "--shard-rows",
        type=number(1),
        metavar="N",
        help="input rows of each shard, of which three are in memory; default: 8192",
    )
    parser.add_argument(
        "--gpu", metavar="GPU", help="that the service runs on, to show what the job costs"
    )
    parser.add_argument(
        "--quantization", choices=["none", "fp8"], default="none", help="that it runs with"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say how much there is and what it costs; send nothing",
    )
    add_json(parser)
    on_modal.add(parser)
    parser.set_defaults(run=partial(run, parser=parser), extra="bulk")


def run(arguments: argparse.Namespace, parser: Parser) -> bool:
    """Embed, or say what would be.

    Args:
        arguments: Those of `add`.
        parser: That has read them.

    Returns:
        True: what fails is raised.

    Raises:
        KalmError: See `embed_corpus`.
        ConfigurationError: An argument cannot be.
    """
    from kalm_integrations.bulk.job import embed_corpus, estimate
    from kalm_integrations.bulk.job_spec import SHARD_ROWS, Options
    from kalm_integrations.bulk.progress import Progress, outcome
    from kalm_integrations.client import KalmClient
    from kalm_integrations.terminal import write

    on_modal.check(arguments, parser)
    elsewhere = on_modal.concerns(arguments)
    if elsewhere:
        arguments.backend = "modal"
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
                shown = on_modal.run(arguments, client, options)
            elif arguments.dry_run:
                counting = replace(options, on_error="skip")  # bad rows are a part of the answer
                found = estimate(arguments.input, client, counting, screen)
                said = _forecast(found, client, options, gpu, elsewhere)
                shown = (
                    json.dumps(said, indent=2)
                    if arguments.json
                    else _forecast_text(said, found, options.on_error)
                )
            else:
                done = embed_corpus(arguments.input, arguments.output, client, options, screen)
                shown = outcome(done, Path(arguments.output), as_json=arguments.json)
    finally:
        screen.close()
    write(shown)
    return True


def _gpu(arguments: argparse.Namespace) -> Choice | None:
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
