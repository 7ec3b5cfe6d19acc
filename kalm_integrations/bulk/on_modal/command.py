"""`kalm embed --on modal`, `--status`, `--fetch` and `--cancel`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from kalm_integrations.bulk.job_spec import Options, Terms
from kalm_integrations.bulk.lock import locked
from kalm_integrations.bulk.manifest import Job
from kalm_integrations.bulk.on_modal import (
    deployment,
    monitor,
    output,
    status_view,
    submit,
    worker_pool,
)
from kalm_integrations.bulk.on_modal import remote_input as remotes
from kalm_integrations.bulk.on_modal.deployment import Place, VolumeStore
from kalm_integrations.bulk.on_modal.remote_input import Remote
from kalm_integrations.bulk.on_modal.state import Reader, State
from kalm_integrations.bulk.on_modal.status_view import Screen
from kalm_integrations.bulk.on_modal.submit import Local
from kalm_integrations.client import KalmClient
from kalm_integrations.errors import JobFailedError, KalmError


def embed(
    arguments: argparse.Namespace, client: KalmClient, options: Options, screen: Screen
) -> tuple[str, State | None]:
    """Send a job, or find it again; watch and fetch it, unless it is to be left alone.

    Args:
        arguments: Of the command.
        client: Whose vectors are wanted.
        options: Of the job.
        screen: Is shown how it goes.

    Returns:
        The job's name, and its state at the end; None where nobody waited for that.

    Raises:
        JobFailedError: Shards failed, or the job was stopped.
        KalmError: Modal failed, or the input cannot be embedded; nothing that is finished is lost.
    """
    there = deployment.find(client.config)
    decided = Terms(
        identity=_identity(client),
        vector_dtype=client.config.vector_dtype,
        truncate=client.config.truncate,
    )
    folder = None if arguments.output is None else Path(arguments.output)
    remote = Remote.read(arguments.input, arguments.bucket_secret)
    containers = arguments.max_containers or worker_pool.MAX_CONTAINERS
    if remote is None:
        local = submit.scanned(arguments.input, options, decided, screen.scanned)
        name = local.name
        if folder is not None:
            output.claim(folder, name, local.job)
        if _send(there, local, containers, screen):
            screen.say(f"{name} is complete")
        else:
            screen.say(f"{name} is on Modal; this terminal may close. {_ways(name)}")
    else:
        name = remote.job_name(options, decided)
        if folder is not None:
            output.claim(folder, name, None)
        if not _at_work(there, there.store(name)):
            remote.prepare(there, name, options, decided, containers)
        screen.say(f"{name} is on Modal; this terminal may close. {_ways(name)}")
    if arguments.detach or folder is None:
        return name, None
    store = there.store(name)
    try:
        while remote is not None and not remotes.prepared(there, store):
            time.sleep(1.0)
        state = monitor.watch(there, name, screen.watched)
    except KeyboardInterrupt:
        screen.close()
        screen.say(f"{name} goes on without you. {_ways(name)}")
        raise
    finally:
        screen.close()
    monitor.check(name, state)
    _fetch(store, name, state, folder, screen)
    return name, state


def _send(there: Place, local: Local, containers: int, screen: Screen) -> bool:
    """Upload and send what is neither finished nor at work; whether all was finished before."""
    store = there.store(local.name)
    state = Reader(store).read()
    if state is None:
        description = submit.upload(store, local, screen.uploaded)
        state = State(description=description, finished={})
    elif monitor.alive(there, store, state):
        screen.say(f"{local.name} runs already")
        return False
    if state.missing:
        queue = there.queue(containers)
        with deployment.translated(there.settings):
            queue.send(store, local.name, state.missing)
    return state.complete


def _at_work(there: Place, store: VolumeStore) -> bool:
    """Whether the input is being read, or the job's shards are waiting or running."""
    state = Reader(store).read()
    if state is not None and monitor.alive(there, store, state):
        return True
    try:
        return not remotes.prepared(there, store)
    except KalmError:
        return False  # of an earlier time: tried anew


def status(word: str, client: KalmClient) -> tuple[str, State | None, bool]:
    """A job's name, its state (None while its input is read), and whether Modal works at it."""
    name = output.named(word)
    there = deployment.find(client.config)
    store = there.store(name)
    state = Reader(store).read()
    if state is None:
        if remotes.prepared(there, store):
            state = Reader(store).read()
        return name, state, True
    return name, state, monitor.alive(there, store, state)


def fetch(word: str, folder: Path, client: KalmClient, screen: Screen) -> tuple[str, State]:
    """Download what is finished.

    Raises:
        JobFailedError: There is no such job, or nothing of it yet.
    """
    name = output.named(word)
    there = deployment.find(client.config)
    store = there.store(name)
    state = Reader(store).read()
    if state is None:
        remotes.prepared(there, store)
        raise JobFailedError(f"{name} has nothing to fetch yet: its input is being read.")
    _fetch(store, name, state, folder, screen)
    return name, state


def cancel(word: str, client: KalmClient) -> tuple[str, State | None]:
    """Stop a job, whether its input is read or its shards are embedded; what is finished stays.

    Returns:
        Its name, and its state; None where nothing was sent yet.

    Raises:
        JobFailedError: There is no such job.
    """
    name = output.named(word)
    there = deployment.find(client.config)
    store = there.store(name)
    if remotes.cancel(there, store):
        return name, Reader(store).read()
    return name, monitor.cancel(there, name)


def said(name: str, state: State | None, *, alive: bool, as_json: bool) -> str:
    """What `--status` and `--cancel` print."""
    if state is None and not alive:
        return (
            json.dumps({"job": name, "state": "stopped"}, indent=2)
            if as_json
            else (f"{name}: stopped, before anything was sent")
        )
    if state is None:
        waiting = {"job": name, "state": "preparing"}
        return json.dumps(waiting, indent=2) if as_json else f"{name}: its input is being read"
    if as_json:
        return json.dumps(status_view.as_data(name, state, alive=alive), indent=2)
    return status_view.as_text(name, state, alive=alive)


def _fetch(store: VolumeStore, name: str, state: State, folder: Path, screen: Screen) -> None:
    job: Job = state.description.job
    output.claim(folder, name, job)
    with locked(folder):
        monitor.fetch(store, state, folder, screen.fetched)


def _identity(client: KalmClient) -> dict[str, object]:
    declared = client.config.expected_space.declared
    # Of a model that nobody described, only a container can tell.
    return (client.vector_identity if declared else client.warm_up()).to_dict()


def _ways(name: str) -> str:
    return (
        f"Come back with the same command, or with `kalm embed --status {name}`, `--fetch {name} "
        f"--output DIR`, `--cancel {name}`."
    )
