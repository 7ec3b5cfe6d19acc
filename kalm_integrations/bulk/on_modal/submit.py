"""A local input to Modal: scanned and split here, uploaded, and sent."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from kalm_integrations.bulk import job_spec, parts, scan, sources
from kalm_integrations.bulk.job_spec import Options, Terms
from kalm_integrations.bulk.manifest import Job
from kalm_integrations.bulk.on_modal import job_state
from kalm_integrations.bulk.on_modal.job_state import Description
from kalm_integrations.bulk.on_modal.store import Store
from kalm_integrations.bulk.scan import Scan
from kalm_integrations.bulk.sources import Source

_AT_ONCE: Final = 16
_BYTES_AT_ONCE: Final = 64 * 2**20
"""Parts that are uploaded together, and so the most that lie on this disk at a time."""


@dataclass(frozen=True)
class Local:
    """An input of this machine, scanned.

    Attributes:
        typed: As it was typed.
        source: Its files.
        found: What is in them.
        job: What is to be made of it.
    """

    typed: str
    source: Source
    found: Scan
    job: Job

    @property
    def name(self) -> str:
        """Of the job on Modal."""
        return job_state.job_name(asdict(self.job))


def scanned(typed: str, options: Options, decided: Terms, seen: Callable[[int], object]) -> Local:
    """Scan a local input.

    Raises:
        ConfigurationError: The input cannot be read, or not as it is asked.
        InvalidInputError: With on_error="fail", rows that cannot be embedded.
    """
    source = sources.find(typed, options.text_column)
    found = scan.scan(source, decided.truncate, seen)
    job_spec.check(found, options)
    parts.check_columns(found)
    return Local(typed, source, found, decided.job(source, found, options))


def upload(store: Store, local: Local, said: Callable[[int, int], None]) -> Description:
    """Upload the parts that are not there yet, and last of all `job.json`.

    Args:
        store: The job's folder.
        local: The input.
        said: Told after each block how many parts are there, of how many.

    Raises:
        ConfigurationError: The input changed since it was scanned.
        KalmError: Modal failed; what is uploaded stays.
    """
    job = local.job
    total = -(-job.rows // job.shard_rows)
    there = store.names(job_state.INPUT)
    tokens: list[int] = []
    waiting: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(prefix="kalm-embed-") as folder:
        size = 0
        for path, count in parts.split(local.source, local.found, job, Path(folder)):
            tokens.append(count)
            part = path.stat().st_size
            if there.get(path.name, (-1, 0))[0] == part:
                path.unlink()
                continue
            waiting[f"{job_state.INPUT}/{path.name}"] = path
            size += part
            if len(waiting) == _AT_ONCE or size >= _BYTES_AT_ONCE:
                _send(store, waiting)
                size = 0
                said(len(tokens), total)
        _send(store, waiting)
    description = Description(job=job, tokens=tokens, source=local.typed)
    store.write({job_state.JOB: description.to_bytes()})
    said(total, total)
    return description


def _send(store: Store, waiting: dict[str, Path]) -> None:
    if waiting:
        store.write(waiting)
    for path in waiting.values():
        path.unlink()
    waiting.clear()
