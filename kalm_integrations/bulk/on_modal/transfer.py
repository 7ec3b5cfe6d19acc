"""Parts on their way to the Volume, from here or from a container, and shards on their way back."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import xxhash

from kalm_integrations.bulk import shards
from kalm_integrations.bulk.manifest import Job, file_digest, written_whole
from kalm_integrations.bulk.on_modal import records
from kalm_integrations.bulk.on_modal.records import Description, Store
from kalm_integrations.bulk.on_modal.state import State
from kalm_integrations.bulk.plan import Plan
from kalm_integrations.bulk.vectors import EarlierVectors
from kalm_integrations.errors import InvalidResponseError

if TYPE_CHECKING:
    from kalm_integrations.bulk.on_modal.cloud import VolumeStore

_PARTS_AT_ONCE: Final = 16
_BYTES_AT_ONCE: Final = 64 * 2**20
"""Parts that are uploaded together, and so the most that lie on this disk at a time."""
_DOWNLOADS: Final = 4


Notify = Callable[[str], object]


def upload(store: Store, plan: Plan, job: Job, source: str, notify: Notify) -> Description:
    """Upload the parts that are not there yet, and `job.json` last.

    Raises:
        ConfigurationError: The input changed since it was planned.
        KalmError: Modal failed; what is uploaded stays.
    """
    there = store.names(records.INPUT)
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
                earlier.give(part)
            path = Path(folder, shards.name_of(part.number))
            size, digest = part.write(path)
            tokens.append(part.tokens)
            digests.append(digest)
            if there.get(path.name, (-1, 0))[0] == size:
                path.unlink()
                continue
            waiting[f"{records.INPUT}/{path.name}"] = path
            waiting_bytes += size
            if len(waiting) == _PARTS_AT_ONCE or waiting_bytes >= _BYTES_AT_ONCE:
                send()
                waiting_bytes = 0
                notify(f"uploading: {len(tokens):,} of {job.shards:,} parts")
        send()
    description = Description(job=job, tokens=tokens, digests=digests, source=source)
    store.write({records.JOB: description.to_bytes()})
    return description


def fetch(store: VolumeStore, state: State, folder: Path, notify: Notify) -> None:
    """Download the finished shards that are not in `folder` yet; of a complete job the manifest
    too, which makes it a finished local job.

    Raises:
        InvalidResponseError: A shard is not what its record says.
        KalmError: Modal failed; what was downloaded stays.
        OSError: It could not be written; what was downloaded stays, too.
    """
    (folder / shards.FOLDER).mkdir(parents=True, exist_ok=True)
    wanted: list[tuple[str, str]] = []
    for shard in state.manifest.shards:
        path = f"{shards.FOLDER}/{shard.name}"
        here = folder / path
        if not here.is_file() or file_digest(here) != shard.digest:
            wanted.append((path, shard.digest))
        if shard.rejected and state.complete:
            wanted.append((shards.rejected_name(shard.name), ""))
    stopped = threading.Event()

    def one(path: str, digest: str) -> None:
        with written_whole(folder / path) as file:
            digester = xxhash.xxh3_128()
            for block in store.blocks(path):
                if stopped.is_set():
                    raise CancelledError
                digester.update(block)
                file.write(block)
            if digest and digester.hexdigest() != digest:
                raise InvalidResponseError(f"{path} did not come as its record says.")

    with ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="kalm-fetch") as threads:
        downloads = [threads.submit(one, *each) for each in wanted]
        try:
            for number, download in enumerate(downloads, 1):
                download.result()
                notify(f"fetching: {number:,} of {len(wanted):,} files")
        except BaseException:
            stopped.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    if state.complete:
        shards.gather_rejected(folder, state.manifest.shards)
        state.manifest.write(folder)
