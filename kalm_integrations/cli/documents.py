"""The JSON documents that commands print; schema.json is their published schema.

`python -m kalm_integrations.cli.documents > kalm_integrations/cli/schema.json` writes it anew.
"""

from __future__ import annotations

import json
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from kalm_integrations.doctor.base import Finding
from kalm_integrations.models import Quantization


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


class Assumption(Document):
    """`basis`: measured, listed, calculated, or given by an option."""

    basis: Literal["measured", "listed", "calculated", "given"]
    figure: str
    source: str


class GpuCost(Document):
    """One GPU and quantization. If there is a `problem`, no figures follow."""

    gpu: str
    quantization: Quantization
    problem: str | None
    dollars_per_hour: float
    tokens_per_second: float | None = None
    basis: Literal["measured", "calculated"] | None = None
    dollars_per_million: float | None = None
    dollars_per_million_at_utilization: float | None = None
    corpus_hours: float | None = None
    corpus_dollars: float | None = None
    hours_up_per_day: float | None = None
    queries_waiting: float | None = None
    dollars_per_month: float | None = None
    always_on_dollars_per_month: float | None = None


class CostReport(Document):
    """`kalm cost`."""

    assumptions: list[Assumption]
    utilization: float
    tokens: int | None
    queries_per_day: int | None
    choices: list[GpuCost]


class EvaluatedSystem(Document):
    """A deployment as it was evaluated; `identity` is null if the service reports none."""

    name: str
    model: str
    identity: dict[str, Any] | None
    query_template: str | None
    document_template: str | None


class Interval(Document):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


class Difference(Interval):
    """To the first system, with the p value of a paired randomization test."""

    p: float


class Measure(Interval):
    """Of one system; the first one has no `difference`."""

    difference: Difference | None = None


class MeasuredSystem(EvaluatedSystem):
    """A system with its measures, by name."""

    measures: dict[str, Measure]


class RetrievalReport(Document):
    """`kalm eval retrieval`."""

    documents: int
    queries: int
    systems: list[MeasuredSystem]


class Distribution(Document):
    """Over texts; empty if it is undefined. `lowest_at` names the text with the lowest value."""

    mean: float | None = None
    median: float | None = None
    p5: float | None = None
    p1: float | None = None
    lowest: float | None = None
    lowest_at: str | None = None


class ComparisonReport(Document):
    """`kalm eval compare`; the figures by name."""

    baseline: EvaluatedSystem
    candidate: EvaluatedSystem
    documents: int
    queries: int
    figures: dict[str, Distribution]


DOCUMENTS: Final = (
    *(ErrorDocument, DoctorReport, EmbedForecast, EmbedOutcome, JobStatus),
    *(CostReport, RetrievalReport, ComparisonReport),
)


def schema() -> str:
    """The JSON schema of all documents, each under its name in `$defs`."""
    _, definitions = models_json_schema(
        [(document, "validation") for document in DOCUMENTS],
        title="JSON documents of the command kalm",
    )
    return json.dumps(definitions, indent=2) + "\n"


if __name__ == "__main__":
    print(schema(), end="")  # noqa: T201
