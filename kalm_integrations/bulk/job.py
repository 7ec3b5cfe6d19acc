"""A job from its beginning to its end, however often it is interrupted in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Protocol

from kalm_integrations.bulk import shards
from kalm_integrations.bulk.job_spec import Options, Terms, check
from kalm_integrations.bulk.lock import locked
from kalm_integrations.bulk.manifest import Manifest, check_same
from kalm_integrations.bulk.pipeline import Pipeline, Watcher, Work
from kalm_integrations.bulk.scan import Scan, scan
from kalm_integrations.bulk.sources import Source, find
from kalm_integrations.client import KalmClient
from kalm_integrations.errors import ConfigurationError

_RETRIES: Final = 100  # of one request, more than an hour of them: its `timeout` comes before


class Screen(Watcher, Protocol):
    """Who shows how a job goes."""

    def scanned(self, rows: int) -> None:
        """So many rows more were read, before anything is sent."""
        ...

    def begun(self, found: Scan, finished: int, manifest: Manifest) -> None:
        """The work begins, with so many rows finished before."""
        ...


class Silent:
    """Nobody watches."""

    def scanned(self, rows: int) -> None: ...
    def begun(self, found: Scan, finished: int, manifest: Manifest) -> None: ...
    def embedded(self, rows: int, tokens: int, rejected: int) -> None: ...
    def written(self, shard: Any) -> None: ...


def embed_corpus(
    source: str | Path,
    output: str | Path,
    client: KalmClient,
    options: Options | None = None,
    screen: Screen | None = None,
) -> Manifest:
    """Embed a corpus into shards, or go on with it where it was interrupted.

    Args:
        source: A file (Parquet, JSON Lines, CSV, text), a folder of such, or a glob.
        output: A folder for the shards and `manifest.json`; the same one resumes.
        client: To embed with.
        options: The defaults, if None.
        screen: Nobody is shown anything, if None.

    Returns:
        The finished job's record.

    Raises:
        ConfigurationError: The input cannot be read, or is not that of the job in `output`.
        InvalidInputError: With on_error="fail", rows that cannot be embedded.
        IdentityMismatchError: The service's vectors are not those of the job in `output`.
        KalmError: The service failed; what is finished stays, and the same call goes on.
        OSError: The output could not be written; the same holds.
    """
    options, screen = options or Options(), screen or Silent()
    files = find(str(source), options.text_column)
    found = _checked(files, options, client, screen)
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"--output {folder} is a file: name a folder for the shards.")
    (folder / shards.FOLDER).mkdir(parents=True, exist_ok=True)
    with locked(folder):
        identity = client.warm_up()
        width = client.vector_dimensions or _width(client)
        terms = Terms(
            identity=identity.to_dict(),
            vector_dtype=client.config.vector_dtype,
            truncate=client.config.truncate,
        )
        job = terms.job(files, found, options)
        manifest = Manifest.read(folder)
        if manifest is None:
            manifest = Manifest(job=job)
        check_same(manifest.job, job, folder)
        _check_shards(folder, manifest)
        screen.begun(found, min(len(manifest.shards) * job.shard_rows, job.rows), manifest)
        if not manifest.complete:
            for left in folder.rglob(".*.tmp"):  # of a process that was killed
                left.unlink()
            manifest.runs += 1
            manifest.write(folder)
            dollars = options.dollars_per_second
            with _patient(client) as patient:
                work = Work(patient, files, found, manifest, folder, width, dollars, screen)
                Pipeline(work).run()
            shards.gather_rejected(folder, manifest.shards)
            manifest.complete = True
            manifest.write(folder)
        return manifest


def estimate(
    source: str | Path,
    client: KalmClient,
    options: Options | None = None,
    screen: Screen | None = None,
) -> Scan:
    """What `embed_corpus` would embed. Sends nothing, writes nothing; raises what it would."""
    options = options or Options()
    files = find(str(source), options.text_column)
    return _checked(files, options, client, screen or Silent())


def _checked(source: Source, options: Options, client: KalmClient, screen: Screen) -> Scan:
    found = scan(source, client.config.truncate, screen.scanned)
    check(found, options)
    return found


def _patient(client: KalmClient) -> KalmClient:
    """The same, but it waits for `timeout` for a service that is gone for a while: a job of hours
    shall not end because a service is started anew. One that asked for a number gets that."""
    most = (
        client.config.max_retries if "max_retries" in client.config.model_fields_set else _RETRIES
    )
    return client.with_options(max_retries=most)


def _width(client: KalmClient) -> int:
    # A model that nobody described: its first answer tells.
    return int(client.embed(["how many dimensions?"]).packed.shape[1])


def _check_shards(folder: Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        path = folder / shards.FOLDER / shard.name
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise ConfigurationError(
                f"{path} is missing or was changed since it was written: restore it from a copy, "
                f"or remove {folder}, and begin anew."
            )
