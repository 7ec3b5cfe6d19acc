"""A job that was sent: is it alive, watched to its end, fetched, cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from kalm_integrations.bulk import shards
from kalm_integrations.bulk.manifest import rename
from kalm_integrations.bulk.on_modal import job_state
from kalm_integrations.bulk.on_modal.deployment import Place, VolumeStore, translated
from kalm_integrations.bulk.on_modal.job_state import Stop
from kalm_integrations.bulk.on_modal.queue import call_of
from kalm_integrations.bulk.on_modal.state import Reader, State
from kalm_integrations.bulk.progress import counted
from kalm_integrations.errors import InvalidResponseError, JobFailedError

_ASKED: Final = 8
"""Shards of which Modal is asked whether they still wait or run."""
_SILENCE: Final = 120.0
"""Seconds without anything new in the records, after which Modal is asked."""
_DOWNLOADS: Final = 4
_SHOWN: Final = 5


def alive(place: Place, store: VolumeStore, state: State) -> bool:
    """Whether Modal still has shards of the newest run, waiting or running."""
    import modal
    from grpclib import GRPCError

    if state.run is None or state.over:
        return False
    told_nothing = (
        GRPCError,
        OSError,
        modal.exception.ConnectionError,
        modal.exception.ClientClosed,
    )
    with translated(place.settings):
        call = call_of(store, state.run.id)
        if call is None:
            return False
        for number in state.waiting[:_ASKED]:
            try:
                call.get(timeout=0, index=state.run.shards.index(number))
            except TimeoutError:
                return True
            except modal.exception.NotFoundError:
                return False
            except told_nothing:
                raise
            except (Exception, modal.exception.InputCancellation):  # noqa: BLE001, S112
                continue  # what the shard ended with; it has no record
    return False


def watch(place: Place, job: str, show: Callable[[State], None]) -> State:
    """Wait for the end of the newest run.

    Args:
        place: Where the job is.
        job: Its name.
        show: Called with each state.

    Raises:
        KalmError: Modal could not be reached, or has lost the run. The job is not touched.
    """
    store = place.store(job)
    reader, begun, changed = Reader(store), time.monotonic(), time.monotonic()
    before: object = None
    while True:
        state = reader.read()
        if state is None:
            raise JobFailedError(f"{job} has no {job_state.JOB}: its upload was interrupted.")
        show(state)
        if state.over:
            return state
        seen = (len(state.finished), len(state.failed), str(state.trying))
        now = time.monotonic()
        if seen != before:
            before, changed = seen, now
        elif now - changed > _SILENCE:
            if not alive(place, store, state):
                raise JobFailedError(f"Modal has no shard of {job} any more, waiting or running.")
            changed = now
        time.sleep(min(5.0, max(0.3, (now - begun) / 20)))


def check(job: str, state: State) -> None:
    """See that a job is complete.

    Raises:
        JobFailedError: It was stopped, or shards failed; says which, and why.
    """
    if state.complete:
        return
    done = f"{len(state.finished):,} of {state.total:,} shards are finished."
    if state.stop is not None:
        raise JobFailedError(
            f"{job} was stopped ({state.stop.reason}): {state.stop.message} {done}"
        )
    if not state.failed:
        raise JobFailedError(f"{job} is not finished: {done}")
    size, rows = state.description.job.shard_rows, state.description.job.rows
    said = [
        f"{shards.name_of(number)} (rows {number * size:,} to "
        f"{min(rows, (number + 1) * size) - 1:,}, tried {len(failure.attempts)} times): "
        f"{failure.code}: {failure.message}"
        for number, failure in sorted(state.failed.items())[:_SHOWN]
    ]
    if len(state.failed) > _SHOWN:
        said.append(f"and {len(state.failed) - _SHOWN:,} more")
    failed = counted(len(state.failed), "shard")
    raise JobFailedError(f"{failed} of {job} failed; {done} {'; '.join(said)}")


def cancel(place: Place, job: str) -> State:
    """Have no further shard begun, and those that run ended. Finished ones stay.

    Raises:
        JobFailedError: There is no such job.
    """
    store = place.store(job)
    state = Reader(store).read()
    if state is None or state.run is None:
        raise JobFailedError(f"there is no job {job} that was sent.")
    if not state.over:
        stop = Stop(reason="cancelled", message="It was cancelled.")
        folder = f"{job_state.RUNS}/{state.run.id}"
        store.write({f"{folder}/{job_state.STOPPED}": job_state.to_bytes(stop)})
        with translated(place.settings):
            call = call_of(store, state.run.id)
            if call is not None:
                call.cancel()
        state = Reader(store).read() or state
    return state


def fetch(store: VolumeStore, state: State, folder: Path, said: Callable[[int, int], None]) -> None:
    """Download the finished shards that are not in `folder` yet; of a complete job the manifest
    too, which makes it a finished local job.

    Raises:
        InvalidResponseError: A shard is not of the size that its record says.
        KalmError: Modal failed; what was downloaded stays.
        OSError: It could not be written; the same holds.
    """
    (folder / shards.FOLDER).mkdir(parents=True, exist_ok=True)
    wanted: list[tuple[str, int | None]] = []
    for number, record in sorted(state.finished.items()):
        wanted.append((f"{shards.FOLDER}/{record.shard.name}", record.shard.bytes))
        if record.shard.rejected and state.complete:
            wanted.append((shards.rejected_name(number), None))
    wanted = [(path, size) for path, size in wanted if not _has(folder / path, size)]
    stopped = threading.Event()

    def one(path: str, size: int | None) -> None:
        target = folder / path
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            with temporary.open("wb") as file:
                for block in store.blocks(path):
                    if stopped.is_set():
                        return
                    file.write(block)
                if size is not None and file.tell() != size:
                    raise InvalidResponseError(
                        f"{path} came with {file.tell():,} bytes, and its record says {size:,}."
                    )
            rename(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    with ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="kalm-fetch") as threads:
        downloads = [threads.submit(one, path, size) for path, size in wanted]
        try:
            for number, download in enumerate(downloads, 1):
                download.result()
                said(number, len(wanted))
        except BaseException:
            stopped.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    if state.complete:
        manifest = state.manifest()
        shards.gather_rejected(folder, manifest.shards)
        manifest.write(folder)


def _has(path: Path, size: int | None) -> bool:
    return size is not None and path.is_file() and path.stat().st_size == size
