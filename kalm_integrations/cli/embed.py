"""`kalm embed`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Final, Literal

from cyclopts import Group, Parameter

from kalm_integrations.cli.failures import needs
from kalm_integrations.cli.parameters import (
    Json,
    TextColumn,
    between,
    positive,
)
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.models import Quantization

_ON_MODAL: Final = Group(
    "On Modal",
    help="Shards run in containers of the app that `kalm deploy` made, in a pool of their own, "
    "and continue when this terminal closes. INPUT may be modal://VOLUME/path or s3://BUCKET/path. "
    "JOB is a job's name, or its --output.",
)
_FOR_MODAL: Final = ("max_containers", "detach", "bucket_secret")
_WITH_A_JOB: Final = {"status": {"json"}, "fetch": {"output", "json"}, "cancel": {"json"}}
_REMOTE: Final = ("modal://", "s3://")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedOptions:
    """The options of `kalm embed`; None is the default that the help names."""

    output: Annotated[
        str | None,
        Parameter(metavar="DIR", help="Folder for the shards; required unless --dry-run is given."),
    ] = None
    text_column: TextColumn = None
    id_column: Annotated[str | None, Parameter(help="Column used as the document ID.")] = None
    allow_duplicate_ids: Annotated[bool, Parameter(help="Accept an ID more than once.")] = False
    encoding: Annotated[
        str | None, Parameter(help="Encoding of CSV and text files. Default: utf-8.")
    ] = None
    on_error: Annotated[
        Literal["fail", "skip", "null"],
        Parameter(
            help="What to do about rows that cannot be embedded: fail before anything is sent, "
            "skip them, or keep them with a null vector. rejected.parquet lists skipped and null "
            "rows."
        ),
    ] = "fail"
    backend: Annotated[
        Literal["auto", "local", "http", "modal"] | None,
        Parameter(help="Where vectors come from. Default: KALM_BACKEND, else what is configured."),
    ] = None
    vector_column: Annotated[str, Parameter(help="Column for the vectors.")] = "vector"
    replace_vector: Annotated[bool, Parameter(help="Drop the input's column of that name.")] = False
    also: Annotated[
        Literal["int8"] | None,
        Parameter(help="Write the vectors in this type too, into a column of its own."),
    ] = None
    vector_dtype: Annotated[
        Literal["float16", "float32"] | None,
        Parameter(help="Type of the vectors. Default: float16."),
    ] = None
    dimensions: Annotated[
        int | None, Parameter(validator=between(1), help="Dimensions of the vectors.")
    ] = None
    shard_rows: Annotated[
        int | None,
        Parameter(
            validator=between(1),
            help="Input rows of each shard, of which three are in memory. Default: 8192.",
        ),
    ] = None
    reuse: Annotated[
        tuple[str, ...],
        Parameter(
            metavar="DIR",
            consume_multiple=False,
            help="Take the vectors of texts that this complete output already has. May be "
            "repeated.",
        ),
    ] = ()
    max_dollars: Annotated[
        float | None,
        Parameter(validator=positive, help="Stop before the job costs more; needs --gpu."),
    ] = None
    max_hours: Annotated[
        float | None, Parameter(validator=positive, help="Stop before the job takes longer.")
    ] = None
    gpu: Annotated[
        str | None, Parameter(help="GPU that the service runs on, to show what the job costs.")
    ] = None
    quantization: Annotated[Quantization, Parameter(help="Quantization that it runs with.")] = (
        "none"
    )
    dry_run: Annotated[
        bool, Parameter(help="Show how much there is and what it costs; send nothing.")
    ] = False
    json: Json = False
    on: Annotated[
        Literal["modal"] | None,
        Parameter(group=_ON_MODAL, help="Where shards are embedded. Default: here."),
    ] = None
    max_containers: Annotated[
        int | None,
        Parameter(
            group=_ON_MODAL,
            validator=between(1, 1000),
            help="Most containers at a time. Default: 4.",
        ),
    ] = None
    detach: Annotated[
        bool, Parameter(group=_ON_MODAL, help="Submit the job and return at once.")
    ] = False
    bucket_secret: Annotated[
        str | None,
        Parameter(group=_ON_MODAL, help="The Modal Secret that holds the bucket's keys."),
    ] = None
    status: Annotated[
        str | None,
        Parameter(group=_ON_MODAL, metavar="JOB", help="Show a job's progress and cost."),
    ] = None
    fetch: Annotated[
        str | None,
        Parameter(
            group=_ON_MODAL, metavar="JOB", help="Download its finished shards into --output."
        ),
    ] = None
    cancel: Annotated[
        str | None,
        Parameter(
            group=_ON_MODAL,
            metavar="JOB",
            help="Stop a job; the command that started it resumes it.",
        ),
    ] = None


def embed(
    input: Annotated[
        str | None,
        Parameter(
            help="Parquet, JSON Lines, CSV (*.csv, *.tsv), text (*.txt, one text a line; *.md and "
            "*.rst, one text a file), a folder of such files, a glob in quotes, or an address "
            "such as s3://BUCKET/path that fsspec reads."
        ),
    ] = None,
    /,
    *,
    options: Annotated[EmbedOptions, Parameter(name="*")] = EmbedOptions(),
) -> int:
    """Embed a corpus, or show what that would take."""
    _check(input, options)
    with needs("bulk"):
        from kalm_integrations.bulk.command import run

        return run(input, options)


def _check(source: str | None, options: EmbedOptions) -> None:
    """Refuse options that do not go together.

    Raises:
        ConfigurationError: Names them.
    """
    given = {
        field.name for field in fields(options) if getattr(options, field.name) != field.default
    }
    if source is not None:
        given.add("input")
    for action, companions in _WITH_A_JOB.items():
        if action not in given:
            continue
        if wrong := sorted(given - {action} - companions):
            raise ConfigurationError(f"--{action} does not go with {_option(wrong[0])}.")
        if action == "fetch" and options.output is None and not Path(str(options.fetch)).is_dir():
            raise ConfigurationError("--fetch needs --output, the folder for the shards.")
        return
    if source is None:
        raise ConfigurationError("INPUT is missing: name the corpus to embed.")
    _check_modal(source, options, given)
    if options.bucket_secret is not None and not source.startswith("s3://"):
        raise ConfigurationError("--bucket-secret is for s3://BUCKET/path.")
    if not options.output and (options.output == "" or not (options.dry_run or options.detach)):
        raise ConfigurationError("--output is missing: name the folder for the shards.")


def _check_modal(source: str, options: EmbedOptions, given: set[str]) -> None:
    remote = source.startswith(_REMOTE)
    if options.on is None:
        if wrong := [name for name in _FOR_MODAL if name in given]:
            raise ConfigurationError(f"{_option(wrong[0])} is for --on modal.")
        if source.startswith("modal://"):
            raise ConfigurationError(f"{source} can be read with --on modal only.")
    elif options.backend not in (None, "modal"):
        raise ConfigurationError(f"--on modal does not go with --backend {options.backend}.")
    elif options.dry_run and (remote or options.detach):
        what = source if remote else "--detach"
        raise ConfigurationError(f"--dry-run does not go with {what}: it reads on this machine.")
    elif not options.dry_run and options.gpu is not None:
        raise ConfigurationError("--gpu goes with --dry-run: a job on Modal records its own cost.")
    elif options.also is not None and not options.dry_run:
        raise ConfigurationError(
            "--also does not go with --on modal, whose shards are written in any order: convert "
            "them afterwards with kalm_integrations.quantize."
        )
    elif remote and options.reuse:
        raise ConfigurationError(f"--reuse does not go with {source}: it reads on this machine.")


def _option(name: str) -> str:
    return "INPUT" if name == "input" else f"--{name.replace('_', '-')}"
