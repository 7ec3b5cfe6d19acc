"""An input that lies on Modal or in a bucket: scanned, split and sent, without any laptop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from kalm_integrations.bulk import job_spec, parts, scan, sources
from kalm_integrations.bulk.job_spec import Options, Terms
from kalm_integrations.bulk.on_modal import job_state
from kalm_integrations.bulk.on_modal.queue import Queue
from kalm_integrations.bulk.on_modal.state import Reader
from kalm_integrations.bulk.on_modal.store import FolderStore
from kalm_integrations.errors import ConfigurationError, KalmError, TransportError
from kalm_integrations.protocol import error_fields

log = logging.getLogger(__name__)
_COMMIT_EVERY: Final = 64  # parts


def prepare(
    asked: Mapping[str, Any], *, volume: Path, mounted: Path, commit: Callable[[], None]
) -> dict[str, Any]:
    """Split the input, unless that is done, and send what is not finished.

    Args:
        asked: What `Remote.prepare` of `kalm_integrations.bulk.on_modal.remote_input` sends.
        volume: Where the jobs' Volume is mounted.
        mounted: Where the input is.
        commit: Of the jobs' Volume.

    Returns:
        Nothing, or {"error": fields}: an exception would be logged by every hand, and tried
        again.
    """
    try:
        store = _Committed(volume / job_state.JOBS / asked["job"], commit)
        _split(asked, store, mounted)
        state = Reader(store).read()
        if state is not None and state.missing:
            Queue(**asked["queue"]).send(store, asked["job"], state.missing)
        return {}
    except KalmError as error:
        return {"error": error_fields(error)}
    except Exception as error:
        log.exception("the input could not be prepared")
        return {"error": error_fields(TransportError(f"{type(error).__name__}: {error}."))}


class _Committed(FolderStore):
    def __init__(self, folder: Path, commit: Callable[[], None]) -> None:
        super().__init__(folder)
        self.commit = commit

    def write(self, files: Mapping[str, bytes | Path]) -> None:
        super().write(files)
        self.commit()


def _split(asked: Mapping[str, Any], store: _Committed, mounted: Path) -> None:
    options, decided = Options(**asked["options"]), Terms(**asked["terms"])
    source = sources.find(str(mounted / asked["path"]), options.text_column)
    try:
        before = job_state.Description.from_bytes(store.read(job_state.JOB))
    except FileNotFoundError:
        pass
    else:
        _check_unchanged(before, source, asked["job"])
        return
    found = scan.scan(source, decided.truncate, lambda _: None)
    job_spec.check(found, options)
    parts.check_columns(found)
    job = decided.job(source, found, options)
    folder = store.folder / job_state.INPUT
    folder.mkdir(parents=True, exist_ok=True)
    tokens = []
    for _, count in parts.split(source, found, job, folder):
        tokens.append(count)
        if len(tokens) % _COMMIT_EVERY == 0:
            store.commit()
    description = job_state.Description(job=job, tokens=tokens, source=asked["source"])
    store.write({job_state.JOB: description.to_bytes()})


def _check_unchanged(before: job_state.Description, source: sources.Source, job: str) -> None:
    if before.job.files != {source.name(file): scan.digest(file) for file in source.files}:
        raise ConfigurationError(
            f"{before.source} changed since {job} was begun, which goes on only as what it was: "
            f"put the input under another path, or remove {job_state.JOBS}/{job} from the Volume."
        )
