"""`kalm embed --on modal`, `--status`, `--fetch` and `--cancel`."""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from kalm_integrations.bulk import shards
from kalm_integrations.bulk.job import locked, plan_input
from kalm_integrations.bulk.local import reuse
from kalm_integrations.bulk.manifest import (
    Job,
    Manifest,
    check_same,
    file_digest,
    rename,
    replace_file,
)
from kalm_integrations.bulk.on_modal import cloud, status_view, worker_pool
from kalm_integrations.bulk.on_modal import state as job_state
from kalm_integrations.bulk.on_modal.cloud import Deployment, RemoteInput, VolumeStore
from kalm_integrations.bulk.on_modal.state import Description, Reader, Run, State
from kalm_integrations.bulk.plan import Options, Plan
from kalm_integrations.bulk.progress import ProgressView, counted, outcome
from kalm_integrations.bulk.vectors import EarlierVectors
from kalm_integrations.client import KalmClient
from kalm_integrations.errors import (
    ConfigurationError,
    InvalidResponseError,
    JobFailedError,
    KalmError,
)

NOTE: Final = "modal-job.json"
_PARTS_AT_ONCE: Final = 16
_BYTES_AT_ONCE: Final = 64 * 2**20
"""Parts that are uploaded together, and so the most that lie on this disk at a time."""
_SILENCE: Final = 120.0
"""Seconds without anything new in the records, after which Modal is asked."""
_DOWNLOADS: Final = 4
_SHOWN: Final = 5


def run(
    arguments: argparse.Namespace, client: KalmClient, options: Options, view: ProgressView
) -> tuple[Manifest | None, str]:
    """Run the command.

    Returns:
        The job's record, if the command waited for the job; and the text to print.

    Raises:
        JobFailedError: There is no such job, or shards failed, or the job was stopped.
        KalmError: Modal failed, or the input cannot be embedded; nothing finished is lost.
    """
    word = arguments.status or arguments.fetch or arguments.cancel
    name = job_named(word) if word else ""
    deployment = cloud.find(client.config)
    if not word:
        return _embed(arguments, deployment, client, options, view)
    store = deployment.store(name)
    if arguments.fetch:
        state = _known_state(deployment, store)
        if state is None:
            raise JobFailedError(f"{name} has nothing to fetch yet: it is prepared.")
        return _fetched(store, name, state, arguments, view)
    if arguments.cancel:
        if not cloud.cancel_preparation(deployment, store):
            state = _known_state(deployment, store)
            if state is None or state.run is None:
                raise JobFailedError(f"there is no job {name} that was sent.")
            cloud.cancel_run(deployment, store, state)
        return None, status_view.shown(name, Reader(store).read(), False, arguments.json)
    state = _known_state(deployment, store)
    alive = state is None or cloud.is_alive(deployment, store, state)
    return None, status_view.shown(name, state, alive, arguments.json)


def _known_state(deployment: Deployment, store: VolumeStore) -> State | None:
    """The job's state; None while its input is prepared."""
    state = Reader(store).read()
    if state is None and cloud.is_prepared(deployment, store):
        state = Reader(store).read()
    return state


def _embed(
    arguments: argparse.Namespace,
    deployment: Deployment,
    client: KalmClient,
    options: Options,
    view: ProgressView,
) -> tuple[Manifest | None, str]:
    """Send a job, or find it again; wait for it and fetch it, unless it runs detached."""
    config = client.config
    # Only a container can tell the identity of a model that nobody described.
    declared = config.expected_space.declared
    identity = (client.vector_identity if declared else client.warm_up()).to_dict()
    folder = None if arguments.output is None else Path(arguments.output)
    remote = RemoteInput.parse(arguments.input, arguments.bucket_secret)
    limits = Run(
        id="",
        shards=[],
        max_containers=arguments.max_containers or worker_pool.MAX_CONTAINERS,
        max_dollars=options.max_dollars,
        max_hours=options.max_hours,
    )
    if remote is None:
        plan = plan_input(arguments.input, client, options, view, folder)
        job = plan.job(identity, config.vector_dtype)
        name = job_state.job_name(job.model_dump())
        if folder is not None:
            claim(folder, name, job)
        if _send(deployment, _Sending(name, plan, job, arguments.input, limits), view):
            view.say(f"{name} is complete")
        else:
            view.say(f"{name} is on Modal; this terminal may close. {status_view.ways(name)}")
    else:
        fixed = {"reuse": (), "dollars_per_second": None, "max_dollars": None, "max_hours": None}
        request: dict[str, Any] = {
            "options": asdict(replace(options, **fixed)),  # type: ignore[arg-type]
            "identity": identity,
            "vector_dtype": config.vector_dtype,
            "truncate": config.truncate,
        }
        name = job_state.job_name({"source": remote.address, **request})
        if folder is not None:
            claim(folder, name, None)
        store = deployment.store(name)
        if not _is_under_way(deployment, store):
            remote.prepare(deployment, name, limits, request)
        view.say(f"{name} is on Modal; this terminal may close. {status_view.ways(name)}")
    if arguments.detach or folder is None:
        return None, json.dumps({"job": name}, indent=2) if arguments.json else name
    store = deployment.store(name)
    try:
        while remote is not None and not cloud.is_prepared(deployment, store):
            time.sleep(1.0)
        state = _wait(deployment, name, view)
    except KeyboardInterrupt:
        view.close()
        view.say(f"{name} goes on. {status_view.ways(name)}")
        raise
    stopped_at_limit = state.stop is not None and state.stop.reason == "limit"
    if not stopped_at_limit:
        _check(name, state)
    return _fetched(store, name, state, arguments, view)


def _is_under_way(deployment: Deployment, store: VolumeStore) -> bool:
    """Whether the input is prepared, or the job's shards are waiting or running."""
    state = Reader(store).read()
    if state is not None and cloud.is_alive(deployment, store, state):
        return True
    try:
        return not cloud.is_prepared(deployment, store)
    except KalmError:
        return False  # an earlier preparation failed, or there was none


@dataclass(frozen=True)
class _Sending:
    name: str
    plan: Plan
    job: Job
    source: str
    limits: Run


def _send(deployment: Deployment, sending: _Sending, view: ProgressView) -> bool:
    """Upload and send what is neither finished nor under way; whether all was finished before."""
    store = deployment.store(sending.name)
    state = Reader(store).read()
    if state is None:
        description = upload(store, sending.plan, sending.job, sending.source, view)
        state = State(description=description, finished={})
    elif cloud.is_alive(deployment, store, state):
        view.say(f"{sending.name} runs already")
        return False
    if state.missing:
        with cloud.translated(deployment.config):
            deployment.queue(sending.limits).send(store, sending.name, state.missing)
    return state.complete


def upload(
    store: job_state.Store, plan: Plan, job: Job, source: str, view: ProgressView
) -> Description:
    """Upload the parts that are not there yet, and `job.json` last.

    Raises:
        ConfigurationError: The input changed since it was planned.
        KalmError: Modal failed; what is uploaded stays.
    """
    there = store.names(job_state.INPUT)
    earlier = EarlierVectors(plan.options.reuse, job) if plan.options.reuse else None
    tokens: list[int] = []
    digests: list[str] = []
    waiting: dict[str, Path] = {}

    def send() -> None:
        if waiting:
            store.write(waiting)
        for path in waiting.values():
            path.unlink()
        waiting.clear()

    with tempfile.TemporaryDirectory(prefix="kalm-embed-") as folder:
        waiting_bytes = 0
        for part in plan.parts():
            if earlier is not None:
                reuse(earlier, part)
            path = Path(folder, shards.name_of(part.number))
            size, digest = part.write(path)
            tokens.append(part.tokens)
            digests.append(digest)
            if there.get(path.name, (-1, 0))[0] == size:
                path.unlink()
                continue
            waiting[f"{job_state.INPUT}/{path.name}"] = path
            waiting_bytes += size
            if len(waiting) == _PARTS_AT_ONCE or waiting_bytes >= _BYTES_AT_ONCE:
                send()
                waiting_bytes = 0
                view.now_and_then(f"uploading: {len(tokens):,} of {counted(job.shards, 'part')}")
        send()
    description = Description(job=job, tokens=tokens, digests=digests, source=source)
    store.write({job_state.JOB: description.to_bytes()})
    return description


def _wait(deployment: Deployment, name: str, view: ProgressView) -> State:
    """Wait for the end of the newest run.

    Raises:
        KalmError: Modal could not be reached, or has lost the run. The job is not touched.
    """
    store = deployment.store(name)
    reader, begun = Reader(store), time.monotonic()
    before, changed = None, begun
    while True:
        state = reader.read()
        if state is None:
            raise JobFailedError(f"{name} has no {job_state.JOB}: its upload was interrupted.")
        manifest = state.manifest()
        view.show(manifest.rows + manifest.rejected, manifest.job.rows, status_view.line(state))
        if state.over:
            return state
        now = time.monotonic()
        seen = (len(state.finished), len(state.failed), str(state.trying))
        if seen != before:
            before, changed = seen, now
        elif now - changed > _SILENCE:
            if not cloud.is_alive(deployment, store, state):
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
        f"{min(rows, (number + 1) * size) - 1:,}, tried {counted(len(failure.attempts), 'time')}): "
        f"{failure.code}: {failure.message}"
        for number, failure in sorted(state.failed.items())[:_SHOWN]
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
    replace_file(folder / NOTE, json.dumps({"job": name}).encode())


def job_named(word: str) -> str:
    """The job that is meant: its name, or a folder that is one's.

    Raises:
        ConfigurationError: It is neither.
    """
    path = Path(word).expanduser()
    noted = _noted(path)
    if noted is None and not job_state.is_job_name(word):
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
    return name if isinstance(name, str) and job_state.is_job_name(name) else None


def _fetched(
    store: VolumeStore,
    name: str,
    state: State,
    arguments: argparse.Namespace,
    view: ProgressView,
) -> tuple[Manifest, str]:
    folder, manifest = Path(arguments.output), state.manifest()
    claim(folder, name, manifest.job)
    with locked(folder):
        fetch(store, state, folder, view)
    text = outcome(manifest, folder, as_json=arguments.json, more={"job": name})
    if not state.complete and not arguments.json:
        done = f"{len(state.finished):,} of {counted(state.total, 'shard')}"
        text += f"\n{name} is not finished: {done}"
    return manifest, text


def fetch(store: VolumeStore, state: State, folder: Path, view: ProgressView) -> None:
    """Download the finished shards that are not in `folder` yet; of a complete job the manifest
    too, which makes it a finished local job.

    Raises:
        InvalidResponseError: A shard is not what its record says.
        KalmError: Modal failed; what was downloaded stays.
        OSError: It could not be written; what was downloaded stays, too.
    """
    (folder / shards.FOLDER).mkdir(parents=True, exist_ok=True)
    wanted: list[tuple[str, str]] = []
    for number, record in sorted(state.finished.items()):
        path = f"{shards.FOLDER}/{record.shard.name}"
        if not _is_there(folder / path, record.shard.digest):
            wanted.append((path, record.shard.digest))
        if record.shard.rejected and state.complete:
            wanted.append((shards.rejected_name(number), ""))
    stopped = threading.Event()

    def one(path: str, digest: str) -> None:
        target = folder / path
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            with temporary.open("wb") as file:
                for block in store.blocks(path):
                    if stopped.is_set():
                        return
                    file.write(block)
            if digest and not _is_there(temporary, digest):
                raise InvalidResponseError(f"{path} did not come as its record says.")
            rename(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    with ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="kalm-fetch") as threads:
        downloads = [threads.submit(one, *each) for each in wanted]
        try:
            for number, download in enumerate(downloads, 1):
                download.result()
                view.now_and_then(f"fetching: {number:,} of {counted(len(wanted), 'file')}")
        except BaseException:
            stopped.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    if state.complete:
        manifest = state.manifest()
        shards.gather_rejected(folder, manifest.shards)
        manifest.write(folder)


def _is_there(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest
