"""`manifest.json`: what a job is and how far it has come. Always replaced whole, in one step."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Literal, Self

import xxhash
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.identity import VectorIdentity
from kalm_integrations.quantize import Int8Calibration

NAME: Final = "manifest.json"
FORMAT: Final = 2
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Record(BaseModel):
    """A JSON document of a job."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    def to_bytes(self) -> bytes:
        """For the file."""
        return self.model_dump_json(indent=1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> Self:
        """The inverse.

        Raises:
            ConfigurationError: It is not such a document of this version.
        """
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the document"
            raise ConfigurationError(
                f"{name} is not valid in this version: {where}: {first['msg']}."
            ) from None


class Job(Record):
    """Everything that decides a job's output, a digest of each input file included. A resumed job
    must be the same."""

    files: dict[str, str]
    text_column: str
    id_column: str | None = None
    vector_column: str = "vector"
    rows: Count
    identity: dict[str, Any]
    vector_dtype: Literal["float16", "float32"]
    truncate: Literal["error", "end"]
    on_error: Literal["fail", "skip", "null"]
    shard_rows: Annotated[int, Field(ge=1)]
    encoding: str = "utf-8"
    also: Literal["int8"] | None = None

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.rows // self.shard_rows)

    @property
    def vector_identity(self) -> VectorIdentity:
        """`identity`, as an object."""
        return VectorIdentity.from_dict(self.identity)

    @field_validator("identity")
    @classmethod
    def _is_identity(cls, value: dict[str, Any]) -> dict[str, Any]:
        VectorIdentity.from_dict(value)
        return value


class Counts(Record):
    """Rows in the shards, rows that were not embedded, rows whose text was cut, rows with another
    job's vectors; what was embedded, and sent."""

    rows: Count = 0
    rejected: Count = 0
    truncated: Count = 0
    reused: Count = 0
    tokens: Count = 0
    requests: Count = 0


class Shard(Counts):
    """A finished shard: its file, with size and digest (none in a manifest of the first format)."""

    name: str
    bytes: Count
    digest: str = ""


class Manifest(Counts):
    """A job's record: what it is, its finished shards in order, and what they took, over all runs:
    seconds, and their price on the GPU that was named. `calibration` is
    that of the int8 vectors, made from the first shard that has vectors."""

    format: Literal[1, 2] = FORMAT
    complete: bool = False
    job: Job
    shards: list[Shard] = Field(default_factory=list)
    calibration: Int8Calibration | None = None
    seconds: Amount = 0.0
    dollars: Amount | None = None
    runs: Count = 0

    @model_validator(mode="after")
    def _has_all_shards(self) -> Self:
        names = [f"part-{number:06}.parquet" for number in range(len(self.shards))]
        is_whole = [shard.name for shard in self.shards] == names
        if self.complete and not (is_whole and len(names) == self.job.shards):
            raise ValueError("it lists other shards than the job has")
        if self.format == FORMAT and not all(shard.digest for shard in self.shards):
            raise ValueError("a shard has no digest")
        return self

    def count(self) -> None:
        """Set the sums."""
        for name in Counts.model_fields:
            setattr(self, name, sum(getattr(shard, name) for shard in self.shards))

    def write(self, folder: Path) -> None:
        """Replace the one in `folder`; a reader sees the old one or this one."""
        with written_whole(folder / NAME) as file:
            file.write(self.to_bytes())

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The one in `folder`; None if there is none.

        Raises:
            ConfigurationError: It is not valid.
        """
        path = folder / NAME
        try:
            return cls.from_bytes(path.read_bytes(), str(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ConfigurationError(f"{path}: {error.strerror}.") from error
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{error.message} Restore it from a copy, or choose another --output."
            ) from None


def check_same(stored: Job, job: Job, folder: Path) -> None:
    """Check that a job is resumed as it was begun.

    Raises:
        IdentityMismatchError: The service has other vectors now.
        ConfigurationError: The input, or an option, has changed.
    """
    if stored.identity != job.identity:
        job.vector_identity.check(stored.vector_identity)
    before, now = stored.model_dump(), job.model_dump()
    different = [name for name in before if before[name] != now[name]]
    if list(stored.files) != list(job.files) and "files" not in different:
        different.append("files")
    if not different:
        return
    if "files" in different:
        what = _changed_files(stored.files, job.files)
    else:
        what = "; ".join(f"{name} was {before[name]!r}, and is {now[name]!r}" for name in different)
    raise ConfigurationError(
        f"{folder} holds another job: {what}. Choose another --output, which keeps what is "
        "finished here, or remove the folder."
    )


def _changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    kinds = {
        "changed": {name for name in before.keys() & now.keys() if before[name] != now[name]},
        "missing": before.keys() - now.keys(),
        "new": now.keys() - before.keys(),
    }
    parts = [
        f"{what} input: {', '.join(sorted(names)[:3])}{' and more' if len(names) > 3 else ''}"
        for what, names in kinds.items()
        if names
    ]
    return "; ".join(parts) or "the input files are in another order"


def file_digest(path: Path) -> str:
    """Digest of a file, which detects damage."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        if temporary.is_file():
            temporary.unlink()
        raise
    if os.name == "posix":  # or the name may be lost in a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
