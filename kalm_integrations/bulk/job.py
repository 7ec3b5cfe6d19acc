"""A job from its beginning to its end, however often it is interrupted in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kalm_integrations.bulk import shards
from kalm_integrations.bulk.local import LocalExecutor, Progress
from kalm_integrations.bulk.manifest import FORMAT, NAME, Manifest, check_same
from kalm_integrations.bulk.options import Options
from kalm_integrations.bulk.plan import Plan, make_plan
from kalm_integrations.bulk.vectors import EarlierVectors, check_shard
from kalm_integrations.client import KalmClient
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.readers.source import Source

_LOCK = ".lock"


def embed_corpus(
    source: str | Path,
    output: str | Path,
    client: KalmClient,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Embed a corpus into shards, or resume a job that was interrupted.

    Args:
        source: A file (Parquet, JSON Lines, CSV, text), a folder of such files, a glob, or an
            address that fsspec can read.
        output: A folder for the shards and `manifest.json`; the same folder resumes.
        client: To embed with.
        options: The defaults, if None.
        progress: Is told how the job goes.

    Returns:
        The job's record; complete unless a limit of `options` has stopped it.

    Raises:
        ConfigurationError: The input cannot be read, or is not that of the job in `output`.
        InvalidInputError: With on_error="fail", rows that cannot be embedded.
        IdentityMismatchError: The service's vectors are not those of the job in `output`.
        KalmError: The service failed; what is finished stays, and the same call resumes.
        OSError: The output could not be written; what is finished stays, too.
    """
    options, progress = options or Options(), progress or Progress()
    folder = Path(output)
    if not str(output):
        raise ConfigurationError("--output is empty: name a folder for the shards.")
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"--output {folder} is a file: name a folder for the shards.")
    if options.max_dollars is not None and options.dollars_per_second is None:
        raise ConfigurationError(
            "--max-dollars needs the price of the GPU that computes: name it with --gpu."
        )
    plan = estimate(source, client, options, progress, folder)
    for name in (folder, folder / shards.FOLDER):
        name.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        identity = client.warm_up()
        # The first answer tells the dimensions of a model without a profile.
        width = client.vector_dimensions or client.embed(["how many?"]).vectors.shape[1]
        job = plan.job(identity.to_dict(), client.config.vector_dtype)
        manifest = _opened(folder, Manifest(job=job))
        earlier = EarlierVectors(options.reuse, job) if options.reuse else None
        progress.begun(plan, min(len(manifest.shards) * job.shard_rows, job.rows), manifest)
        if not manifest.complete:
            for left in [*folder.glob(".*.tmp"), *(folder / shards.FOLDER).glob(".*.tmp")]:
                with suppress(OSError):  # what a killed process left half-written
                    left.unlink()
            manifest.runs += 1
            manifest.write(folder)
            LocalExecutor(client, plan, manifest, folder, width, earlier, progress).run()
            if len(manifest.shards) == job.shards:
                shards.gather_rejected(folder, manifest.shards)
                manifest.complete = True
                manifest.write(folder)
        return manifest


def estimate(
    source: str | Path,
    client: KalmClient,
    options: Options | None = None,
    progress: Progress | None = None,
    output: Path | None = None,
    *,
    refuse_bad: bool = True,
) -> Plan:
    """The plan of what `embed_corpus` would embed. Sends nothing, writes nothing.

    Raises:
        KalmError: What `embed_corpus` would raise of the input.
    """
    options, progress = options or Options(), progress or Progress()
    files = Source(str(source), options.text_column, options.encoding, exclude=output)
    if output is not None:
        _check_apart(str(source), output)
    truncate = client.config.truncate
    return make_plan(files, truncate, options, progress.scanned, refuse_bad=refuse_bad)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of a job's output. The lock ends with the process.

    Raises:
        ConfigurationError: One is at work there.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / _LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigurationError(f"another process is at work in {folder}.") from None
    try:
        yield
    finally:
        lock.release()


def _opened(folder: Path, new: Manifest) -> Manifest:
    """The manifest to go on with: that of the same job, or `new`."""
    manifest = Manifest.read(folder)
    if manifest is None:
        if any((folder / shards.FOLDER).glob("*.parquet")):
            raise ConfigurationError(
                f"{folder} has shards and no {NAME}: choose another --output, or restore the file."
            )
        return new
    if manifest.format != FORMAT:
        raise ConfigurationError(f"{folder} holds another version's job: choose another --output.")
    check_same(manifest.job, new.job, folder)
    names = [shards.name_of(number) for number in range(len(manifest.shards))]
    if [shard.name for shard in manifest.shards] != names:
        raise ConfigurationError(
            f"{folder / NAME} lists other shards than the job has: restore it from a copy, or "
            "choose another --output."
        )
    for shard in manifest.shards:
        check_shard(folder / shards.FOLDER / shard.name, shard.bytes, shard.digest)
    return manifest


def _check_apart(source: str, output: Path) -> None:
    """Refuse an output within the input, unless it is a job's, whose files are left out."""
    if "://" in source:
        return
    path, folder = Path(source).expanduser().resolve(), output.expanduser().resolve()
    if path.is_dir() and (folder == path or path in folder.parents):
        if folder != path and (folder / NAME).is_file():
            return
        raise ConfigurationError(
            f"--output {output} is within the input {source}: choose a folder outside of it."
        )
    if folder / shards.FOLDER in (path, *path.parents):
        raise ConfigurationError(f"the input {source} is within --output {output}.")
