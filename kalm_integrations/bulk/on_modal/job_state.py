"""What a job's folder in the Volume holds. Whoever writes and whoever reads it agree here.

```text
jobs/JOB/job.json                 what is embedded; there once the whole input is
         input/part-000000.parquet
         shards/, .rejected-*     as a local job's
         records/000000.json      a finished shard
         runs/RUN/run.json        what was sent to Modal's queue, and with what call
                  attempts-000000.json, failed-000000.json, canary-CONTAINER.json, stopped.json
         manifest.json, rejected.parquet    at the end, as a local job's
```

A run is one time that the job was sent. The newest counts: inputs of older ones end at once, so
that what failed, or was cancelled, is tried anew by a new run and nothing has to be removed.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

from kalm_integrations.bulk.manifest import Job, Shard
from kalm_integrations.errors import ConfigurationError

JOBS: Final = "jobs"
JOB: Final = "job.json"
PREPARING: Final = "preparing.json"
INPUT: Final = "input"
RECORDS: Final = "records"
RUNS: Final = "runs"
RUN: Final = "run.json"
CALL: Final = "call.json"
STOPPED: Final = "stopped.json"
_FORMAT: Final = 1

MOST_ATTEMPTS: Final = 4
"""Of a shard in one run; containers that died with it count."""
MOST_CANARIES: Final = 3
"""Containers of a run that may find their own vectors wrong: each start is paid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """`job.json`.

    Attributes:
        job: What decides the output.
        tokens: Of each shard, estimated.
        source: What was embedded, as it was typed.
    """

    job: Job
    tokens: list[int]
    source: str

    def to_bytes(self) -> bytes:
        """For the file."""
        return to_bytes({"format": _FORMAT, **asdict(self)})

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """The inverse.

        Raises:
            ConfigurationError: It is none of this version's.
        """
        try:
            found = json.loads(content)
            if found.pop("format") != _FORMAT:
                raise ValueError("another format")
            return cls(**{**found, "job": Job(**found["job"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"the job on Modal is none of this version's ({error!r})."
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One time that a container took a shard.

    Attributes:
        container: Modal's id of it.
        started: When the container was ready to work, seconds since 1970.
        at: When it took the shard.
        dollars_per_second: Of the container.
        error: What this attempt failed with; empty where nobody lived to say it.
    """

    container: str
    started: float
    at: float
    dollars_per_second: float
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A finished shard: what the manifest has of it, and how it was made.

    Attributes:
        shard: For the manifest.
        attempts: The last one finished it.
        finished: When.
        gpu: What the container was asked to have; empty without one.
    """

    shard: Shard
    attempts: list[Attempt]
    finished: float
    gpu: str

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """The inverse of `to_bytes`."""
        found = json.loads(content)
        shard, attempts = Shard(**found.pop("shard")), attempts_of(found.pop("attempts"))
        return cls(shard=shard, attempts=attempts, **found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A shard that this run gave up.

    Attributes:
        code: Of the error.
        message: What it says.
        attempts: Each time that it was tried.
    """

    code: str
    message: str
    attempts: list[Attempt]

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """The inverse of `to_bytes`."""
        found = json.loads(content)
        return cls(attempts=attempts_of(found.pop("attempts")), **found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Why a run ends before its shards do: "cancelled", "identity" or "canary"."""

    reason: str
    message: str
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """`run.json`.

    Attributes:
        id: The newer, the later in the alphabet.
        shards: Those that were sent, in order.
        max_containers: That were allowed.
    """

    id: str
    shards: list[int]
    max_containers: int


def new_run() -> str:
    """An id for a run."""
    return f"{time.time_ns() // 1_000_000:013d}-{secrets.token_hex(2)}"


def job_name(description: Mapping[str, Any]) -> str:
    """What a job is called: derived, so that the same command finds it and no other does."""
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":"))
    return f"embed-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"


def is_job_name(name: str) -> bool:
    """Whether it is one of `job_name`'s."""
    head, _, digits = name.partition("-")
    return head == "embed" and len(digits) == 16 and set(digits) <= set("0123456789abcdef")


def record_name(number: int) -> str:
    """Of a finished shard's record."""
    return f"{number:06}.json"


def attempts_name(number: int) -> str:
    """Of a run's attempts at a shard."""
    return f"attempts-{number:06}.json"


def failed_name(number: int) -> str:
    """Of what a run gave a shard up for."""
    return f"failed-{number:06}.json"


def number_in(name: str) -> int:
    """The shard that a file of `records` or a run is of; -1 if it is of none."""
    digits = name.removesuffix(".json").rpartition("-")[2]
    return int(digits) if digits.isdigit() and name.endswith(".json") else -1


def read_attempts(content: bytes) -> list[Attempt]:
    """A run's file of attempts."""
    return attempts_of(json.loads(content))


def attempts_of(found: list[dict[str, Any]]) -> list[Attempt]:
    """Attempts, as JSON has them."""
    return [Attempt(**attempt) for attempt in found]


def to_bytes(content: Any) -> bytes:
    """JSON of a record."""
    if not isinstance(content, dict | list):
        content = asdict(content)
    return json.dumps(content, default=asdict).encode()
