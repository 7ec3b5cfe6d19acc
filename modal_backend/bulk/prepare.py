"""An input that lies on Modal or in a bucket: planned, split and sent without any laptop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from kalm_integrations.bulk import shards
from kalm_integrations.bulk.on_modal import records
from kalm_integrations.bulk.on_modal.records import Description, FolderStore, Run, send_run
from kalm_integrations.bulk.on_modal.state import Reader
from kalm_integrations.bulk.options import Options
from kalm_integrations.bulk.plan import make_plan
from kalm_integrations.errors import ConfigurationError, KalmError, TransportError
from kalm_integrations.protocol import error_fields
from kalm_integrations.readers.source import Source

log = logging.getLogger(__name__)
_COMMIT_EVERY: Final = 64  # parts


def prepare(
    request: Mapping[str, Any], *, volume: Path, mounted: Path, commit: Callable[[], None]
) -> dict[str, Any]:
    """Split the mounted input, unless that is done, and send what is not finished.

    `request` comes from `RemoteInput.prepare` in `kalm_integrations.bulk.on_modal.remote`; `volume`
    and `commit` are the jobs' own.

    Returns:
        Nothing, or {"error": fields}: an exception would be logged and tried again.
    """
    try:
        store = _CommittingStore(volume / records.JOBS / request["job"], commit)
        _split(request, store, mounted)
        state = Reader(store).read()
        if state is not None and state.missing:
            run = Run(**{**request["limits"], "shards": state.missing})
            send_run(request["app"], request["environment"], store, request["job"], run)
        return {}
    except KalmError as error:
        return {"error": error_fields(error)}
    except Exception as error:
        log.exception("the input could not be prepared")
        return {"error": error_fields(TransportError(f"{type(error).__name__}: {error}."))}


class _CommittingStore(FolderStore):
    def __init__(self, folder: Path, commit: Callable[[], None]) -> None:
        super().__init__(folder)
        self.commit = commit

    def write(self, files: Mapping[str, bytes | Path]) -> None:
        super().write(files)
        self.commit()


def _split(request: Mapping[str, Any], store: _CommittingStore, mounted: Path) -> None:
    options = Options(**request["options"])
    source = Source(str(mounted / request["path"]), options.text_column, options.encoding)
    plan = make_plan(source, request["truncate"], options, lambda _: None)
    try:
        before = Description.from_bytes(store.read(records.JOB), records.JOB)
    except FileNotFoundError:
        pass
    else:
        if before.job.files != plan.files:
            raise ConfigurationError(
                f"{before.source} changed since {request['job']} was begun: put the input under "
                f"another path, or remove {records.JOBS}/{request['job']} from the Volume."
            )
        return
    folder = store.folder / records.INPUT
    folder.mkdir(parents=True, exist_ok=True)
    tokens, digests = [], []
    for part in plan.parts():
        _, digest = part.write(folder / shards.name_of(part.number))
        tokens.append(part.tokens)
        digests.append(digest)
        if len(tokens) % _COMMIT_EVERY == 0:
            store.commit()
    job = plan.job(request["identity"], request["vector_dtype"])
    description = Description(job=job, tokens=tokens, digests=digests, source=request["source"])
    store.write({records.JOB: description.to_bytes()})
