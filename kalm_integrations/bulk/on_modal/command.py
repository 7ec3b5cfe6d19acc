"""`kalm embed --on modal`, `--status`, `--fetch` and `--cancel`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kalm_integrations.bulk import shards
from kalm_integrations.bulk.job import estimate, locked
from kalm_integrations.bulk.manifest import Job, Manifest, check_same, written_whole
from kalm_integrations.bulk.on_modal import cloud, records, status_view, worker_pool
from kalm_integrations.bulk.on_modal.cloud import Deployment, VolumeStore
from kalm_integrations.bulk.on_modal.records import Run
from kalm_integrations.bulk.on_modal.remote import RemoteInput, cancel_preparation, is_prepared
from kalm_integrations.bulk.on_modal.state import Reader, State
from kalm_integrations.bulk.on_modal.transfer import fetch, upload
from kalm_integrations.bulk.options import Options
from kalm_integrations.bulk.plan import Plan
from kalm_integrations.bulk.progress import ProgressView, counted, outcome
from kalm_integrations.client import KalmClient
from kalm_integrations.errors import ConfigurationError, JobFailedError, KalmError

if TYPE_CHECKING:
    from kalm_integrations.cli.embed import EmbedOptions

NOTE: Final = "modal-job.json"
_SILENCE: Final = 120.0
"""Seconds without anything new in the records, after which Modal is asked."""
_SHOWN: Final = 5


def run(
    source: str | None,
    chosen: EmbedOptions,
    client: KalmClient,
    options: Options,
    view: ProgressView,
) -> tuple[Manifest | None, str]:
    """Run the command.

    Returns:
        The job's record, if the command waited for the job; and the text to print.

    Raises:
        JobFailedError: There is no such job, or shards failed, or the job was stopped.
        KalmError: Modal failed, or the input cannot be embedded; nothing finished is lost.
    """
    if source is not None:
        return _embed(source, chosen, client, options, view)
    name = job_named(str(chosen.status or chosen.fetch or chosen.cancel))
    deployment = cloud.find(client.config)
    store = deployment.store(name)
    if chosen.cancel and cancel_preparation(deployment, store):
        return None, status_view.shown(name, Reader(store).read(), False, chosen.json)
    state = Reader(store).read()
    if state is None and is_prepared(deployment, store):
        state = Reader(store).read()
    if chosen.fetch:
        if state is None:
            raise JobFailedError(f"{name} has nothing to fetch yet: it is prepared.")
        return _fetched(store, name, state, chosen, view)
    if chosen.cancel:
        if state is None or state.run is None:
            raise JobFailedError(f"there is no job {name} that was sent.")
        cloud.cancel_run(deployment, store, state)
        return None, status_view.shown(name, Reader(store).read(), False, chosen.json)
    alive = state is None or cloud.is_alive(deployment, state)
    return None, status_view.shown(name, state, alive, chosen.json)


def _embed(
    source: str,
    chosen: EmbedOptions,
    client: KalmClient,
    options: Options,
    view: ProgressView,
) -> tuple[Manifest | None, str]:
    """Send a job, or find it again; wait for it and fetch it, unless it runs detached."""
    config, deployment = client.config, cloud.find(client.config)
    # Only a container can tell the identity of a model that nobody described.
    declared = config.expected_space.declared
    identity = (client.vector_identity if declared else client.warm_up()).to_dict()
    folder = None if chosen.output is None else Path(chosen.output)
    remote = RemoteInput.parse(source, chosen.bucket_secret)
    limits = Run(
        id=records.new_run(),
        shards=[],
        max_containers=chosen.max_containers or worker_pool.MAX_CONTAINERS,
        max_dollars=options.max_dollars,
        max_hours=options.max_hours,
    )
    complete = False
    if remote is None:
        plan = estimate(source, client, options, view, folder)
        job = plan.job(identity, config.vector_dtype)
        name = records.job_name(job.model_dump())
        if folder is not None:
            claim(folder, name, job)
        complete = _send(deployment, name, (plan, job, source), limits, view)
    else:
        fixed = {"reuse": (), "dollars_per_second": None, "max_dollars": None, "max_hours": None}
        request: dict[str, Any] = {
            "options": asdict(replace(options, **fixed)),  # type: ignore[arg-type]
            "identity": identity,
            "vector_dtype": config.vector_dtype,
            "truncate": config.truncate,
        }
        name = records.job_name({"source": remote.address, **request})
        if folder is not None:
            claim(folder, name, None)
        if not _is_under_way(deployment, deployment.store(name)):
            remote.prepare(deployment, name, limits, request)
    on_its_way = f"is on Modal; this terminal may close. {status_view.ways(name)}"
    view.say(f"{name} {'is complete' if complete else on_its_way}")
    if chosen.detach or folder is None:
        return None, json.dumps({"job": name}, indent=2) if chosen.json else name
    store = deployment.store(name)
    try:
        while remote is not None and not is_prepared(deployment, store):
            time.sleep(1.0)
        state = _wait(deployment, name, view)
    except KeyboardInterrupt:
        view.close()
        view.say(f"{name} goes on. {status_view.ways(name)}")
        raise
    if state.stop is None or state.stop.reason != "limit":
        _check(name, state)
    return _fetched(store, name, state, chosen, view)


def _is_under_way(deployment: Deployment, store: VolumeStore) -> bool:
    """Whether the input is prepared, or the job's shards are waiting or running."""
    state = Reader(store).read()
    if state is not None and cloud.is_alive(deployment, state):
        return True
    try:
        return not is_prepared(deployment, store)
    except KalmError:
        return False  # an earlier preparation failed, or there was none


def _send(
    deployment: Deployment,
    name: str,
    planned: tuple[Plan, Job, str],
    run: Run,
    view: ProgressView,
) -> bool:
    """Upload and send what is neither finished nor under way; whether all was finished before."""
    store, config = deployment.store(name), deployment.config
    state = Reader(store).read()
    if state is None:
        state = State(description=upload(store, *planned, view.now_and_then))
    elif cloud.is_alive(deployment, state):
        view.say(f"{name} runs already")
        return False
    if state.missing:
        run.shards = state.missing
        with cloud.translated(config):
            records.send_run(config.app_name, config.environment_name, store, name, run)
    return state.complete


def _wait(deployment: Deployment, name: str, view: ProgressView) -> State:
    """Wait for the end of the newest run.

    Raises:
        KalmError: Modal could not be reached, or has lost the run. The job is not touched.
    """
    reader, begun = Reader(deployment.store(name)), time.monotonic()
    before, changed = None, begun
    while True:
        state = reader.read()
        if state is None:
            raise JobFailedError(f"{name} has no {records.JOB}: its upload was interrupted.")
        done = state.manifest.rows + state.manifest.rejected
        view.show(done, state.manifest.job.rows, status_view.line(state))
        if state.over:
            return state
        now = time.monotonic()
        if state.records != before:
            before, changed = state.records, now
        elif now - changed > _SILENCE:
            if not cloud.is_alive(deployment, state):
                raise JobFailedError(f"Modal has no shard of {name} any more, waiting or running.")
            changed = now
        time.sleep(min(5.0, max(0.3, (now - begun) / 20)))


def _check(name: str, state: State) -> None:
    """Raise `JobFailedError` unless the job is complete."""
    if state.complete:
        return
    done = f"{len(state.finished):,} of {counted(state.total, 'shard')} are finished."
    if state.stop is not None:
        raise JobFailedError(
            f"{name} was stopped ({state.stop.reason}): {state.stop.message} {done}"
        )
    if not state.failed:
        raise JobFailedError(f"{name} is not finished: {done}")
    size, rows = state.description.job.shard_rows, state.description.job.rows
    parts = [
        f"{shards.name_of(number)} (rows {number * size:,} to "
        f"{min(rows, (number + 1) * size) - 1:,}, tried {counted(len(record.attempts), 'time')}): "
        f"{record.code}: {record.message}"
        for number, record in list(state.failed.items())[:_SHOWN]
    ]
    if len(state.failed) > _SHOWN:
        parts.append(f"and {len(state.failed) - _SHOWN:,} more")
    failed = counted(len(state.failed), "shard")
    raise JobFailedError(f"{failed} of {name} failed; {done} {'; '.join(parts)}")


# --- the folder here


def claim(folder: Path, name: str, job: Job | None) -> None:
    """Note that a folder is a job's.

    Raises:
        ConfigurationError: It holds another job.
        IdentityMismatchError: It holds vectors of another space.
    """
    manifest, noted = Manifest.read(folder), _noted(folder)
    if manifest is not None and job is not None:
        check_same(manifest.job, job, folder)
    elif noted not in (None, name) or (noted is None and any(folder.glob(f"{shards.FOLDER}/*"))):
        raise ConfigurationError(
            f"{folder} holds {noted or 'shards of another job'}: choose another --output."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / NOTE) as file:
        file.write(json.dumps({"job": name}).encode())


def job_named(word: str) -> str:
    """The job that is meant: its name, or a folder that is one's.

    Raises:
        ConfigurationError: It is neither.
    """
    path = Path(word).expanduser()
    noted = _noted(path)
    if noted is None and not records.is_job_name(word):
        if Manifest.read(path) is not None:
            raise ConfigurationError(
                f"{word!r} is the output of a local job: its manifest.json shows how far it is, "
                "and the same command resumes it."
            )
        raise ConfigurationError(
            f"{word!r} is neither a job's name, like embed-0123456789abcdef, nor an --output of "
            "`kalm embed --on modal`."
        )
    return noted or word


def _noted(folder: Path) -> str | None:
    try:
        name = json.loads((folder / NOTE).read_bytes())["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and records.is_job_name(name) else None


def _fetched(
    store: VolumeStore, name: str, state: State, chosen: EmbedOptions, view: ProgressView
) -> tuple[Manifest, str]:
    folder, manifest = Path(str(chosen.output)), state.manifest
    claim(folder, name, manifest.job)
    with locked(folder):
        fetch(store, state, folder, view.now_and_then)
    text = outcome(manifest, folder, as_json=chosen.json, more={"job": name})
    if not state.complete and not chosen.json:
        done = f"{len(state.finished):,} of {counted(state.total, 'shard')}"
        text += f"\n{name} is not finished: {done}"
    return manifest, text
