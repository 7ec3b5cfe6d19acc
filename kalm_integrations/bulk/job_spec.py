"""What a job is asked to be, and whether an input allows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from kalm_integrations.bulk import shards
from kalm_integrations.bulk.manifest import Job
from kalm_integrations.bulk.scan import Scan
from kalm_integrations.bulk.sources import Source
from kalm_integrations.errors import BadRowsError, ConfigurationError
from kalm_integrations.protocol import Truncate

OnError = Literal["fail", "skip", "null"]
SHARD_ROWS: Final = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a corpus is embedded.

    Attributes:
        text_column: Of Parquet, JSON Lines and CSV, what is embedded; None is "text".
        id_column: The column that names a row to a store; kept with the job.
        on_error: Of rows that cannot be embedded: "fail" before anything is sent, as far as that
            can be told; "skip" leaves them out; "null" keeps them with a null vector. With the
            latter two they are in `rejected.parquet`, with their reasons.
        shard_rows: Input rows of each shard; 8,192 vectors of 3840 float16 are 60 MiB. Three
            shards are in memory.
        dollars_per_second: Of the GPU that computes, to show what the job costs.
    """

    text_column: str | None = None
    id_column: str | None = None
    on_error: OnError = "fail"
    shard_rows: int = SHARD_ROWS
    dollars_per_second: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the client decides of every vector.

    Attributes:
        identity: `VectorIdentity.to_dict()`.
        vector_dtype: "float16" or "float32".
        truncate: What is done with texts over the model's length.
    """

    identity: dict[str, Any]
    vector_dtype: str
    truncate: Truncate

    def job(self, source: Source, found: Scan, options: Options) -> Job:
        """All that decides the output."""
        return Job(
            files=found.files,
            text_column=source.text_column,
            id_column=options.id_column,
            rows=found.rows,
            identity=self.identity,
            vector_dtype=self.vector_dtype,
            truncate=self.truncate,
            on_error=options.on_error,
            shard_rows=options.shard_rows,
        )


def check(found: Scan, options: Options) -> None:
    """See that what was found can be embedded as it is asked.

    Raises:
        ConfigurationError: A column is missing, or has the vectors' name.
        BadRowsError: Rows cannot be embedded, and on_error is "fail"; or none can.
    """
    names = found.schema.names
    if options.id_column is not None and options.id_column not in names:
        raise ConfigurationError(
            f"no column {options.id_column!r}, but {', '.join(map(repr, names))}: --id-column "
            "names one of them."
        )
    if shards.VECTOR in names:
        raise ConfigurationError(f"the input has a column {shards.VECTOR!r} already.")
    if found.distinct == 0 or (found.bad and options.on_error == "fail"):
        more = f"; and {found.bad - len(found.examples):,} more" if found.bad > 5 else ""
        raise BadRowsError(
            f"{found.bad:,} of {found.rows:,} rows cannot be embedded: "
            f"{'; '.join(found.examples)}{more}. Nothing was sent."
        )
