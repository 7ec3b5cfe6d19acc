"""An input that lies on Modal or in a bucket: planned, split and sent without any laptop."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kalm_integrations.bulk.on_modal import records
from kalm_integrations.bulk.on_modal.records import FolderStore, Run, send_run
from kalm_integrations.bulk.on_modal.state import Reader
from kalm_integrations.bulk.on_modal.transfer import upload
from kalm_integrations.bulk.options import Options
from kalm_integrations.bulk.plan import make_plan
from kalm_integrations.errors import ConfigurationError, KalmError, TransportError
from kalm_integrations.protocol import error_fields
from kalm_integrations.readers.source import Source

log = logging.getLogger(__name__)


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
        store = FolderStore(volume / records.JOBS / request["job"], commit)
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


def _split(request: Mapping[str, Any], store: FolderStore, mounted: Path) -> None:
    options = Options(**request["options"])
    source = Source(str(mounted / request["path"]), options.text_column, options.encoding)
    plan = make_plan(source, request["truncate"], options, lambda _: None)
    state = Reader(store).read()
    if state is None:
        # Parts of an earlier attempt may be those of another input.
        shutil.rmtree(store.folder / records.INPUT, ignore_errors=True)
        job = plan.job(request["identity"], request["vector_dtype"])
        upload(store, plan, job, request["source"], lambda _: None)
    elif state.description.job.files != plan.files:
        raise ConfigurationError(
            f"{state.description.source} changed since {request['job']} was begun: put the input "
            f"under another path, or remove {records.JOBS}/{request['job']} from the Volume."
        )
