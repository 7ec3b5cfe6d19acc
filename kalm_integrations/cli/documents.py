"""The JSON documents that commands print; schema.json is their published schema.

`python -m kalm_integrations.cli.documents > kalm_integrations/cli/schema.json` writes it anew.
"""

from __future__ import annotations

import json
from typing import Any, Final

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from kalm_integrations.doctor.base import Finding


class Document(BaseModel):
    """Base class: later versions may add fields."""

    model_config = ConfigDict(extra="allow")


class Error(Document):
    """Why the command failed."""

    code: str
    message: str
    remedy: str
    exit_status: int


class ErrorDocument(Document):
    """Any command that could not do its work."""

    error: Error


class DoctorReport(Document):
    """`kalm doctor`: `backend` is null if the settings are wrong; `wake`: a start was allowed."""

    ok: bool
    summary: str
    version: str
    backend: str | None
    wake: bool
    checks: list[Finding]


class ContainersForecast(Document):
    """Time and cost of a job on so many containers of Modal."""

    containers: int
    hours: float
    dollars: float


class EmbedForecast(Document):
    """`kalm embed --dry-run`; with `--gpu` also time and cost."""

    rows: int
    texts: int
    copies: int
    bad_rows: int
    tokens: int
    shards: int
    vector_bytes: int | None
    gpu: str | None = None
    tokens_per_second: float | None = None
    measured: bool | None = None
    hours: float | None = None
    dollars: float | None = None
    on_modal: list[ContainersForecast] | None = None


class EmbedOutcome(Document):
    """`kalm embed`, and `--fetch`: a job that ended; `job` and `complete` only for Modal."""

    output: str
    rows: int
    rejected: int
    tokens: int
    shards: int
    seconds: float
    dollars: float | None
    runs: int
    identity: dict[str, Any]
    job: str | None = None
    complete: bool | None = None


class FailedShard(Document):
    """A shard that could not be embedded."""

    shard: int
    code: str
    message: str


class JobStatus(Document):
    """`kalm embed --status`, `--cancel` and `--detach`; only `job` where nothing else is known."""

    job: str
    state: str = ""
    source: str | None = None
    shards: int | None = None
    finished: int | None = None
    failed: list[FailedShard] | None = None
    stopped: dict[str, str] | None = None
    rows: int | None = None
    rejected: int | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    containers: int | None = None
    container_seconds: float | None = None
    dollars: float | None = None
    dollars_to_come: float | None = None
    runs: int | None = None
    identity: dict[str, Any] | None = None


DOCUMENTS: Final = (ErrorDocument, DoctorReport, EmbedForecast, EmbedOutcome, JobStatus)


def schema() -> str:
    """The JSON schema of all documents, each under its name in `$defs`."""
    _, definitions = models_json_schema(
        [(document, "validation") for document in DOCUMENTS],
        title="JSON documents of the command kalm",
    )
    return json.dumps(definitions, indent=2) + "\n"


if __name__ == "__main__":
    print(schema(), end="")  # noqa: T201
