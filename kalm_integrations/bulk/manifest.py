"""`manifest.json`: what a job is, and how far it has come. Rewritten whole, in one step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.identity import VectorIdentity

NAME: Final = "manifest.json"
FORMAT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What decides every byte of a job's vectors and rows. A resumed job must be the same.

    Attributes:
        files: Digest (SHA-256) of each input file, in order.
        text_column: What is embedded.
        id_column: What names a row to stores; None where nothing does.
        rows: Of the input.
        identity: What the vectors may be compared with.
        vector_dtype: "float16" or "float32".
        truncate: What is done with texts over the model's length.
        on_error: What is done with rows that cannot be embedded.
        shard_rows: Input rows of each shard.
    """

    files: dict[str, str]
    text_column: str
    id_column: str | None
    rows: int
    identity: dict[str, Any]
    vector_dtype: str
    truncate: str
    on_error: str
    shard_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A finished one. `rows` are in the file, `rejected` are not embedded."""

    name: str
    rows: int
    rejected: int
    bytes: int
    tokens: int
    requests: int


@dataclass(slots=True, kw_only=True)
class Manifest:
    """A job's record.

    Attributes:
        job: What it is.
        shards: What is finished: always the first so many.
        seconds: That embedding took, over all runs.
        runs: How often it was started.
        dollars: For those seconds on the GPU that was named; None if none was.
        complete: Whether all is there.
    """

    job: Job
    shards: list[Shard] = field(default_factory=list)
    seconds: float = 0.0
    runs: int = 0
    dollars: float | None = None
    complete: bool = False

    @property
    def tokens(self) -> int:
        """That were embedded."""
        return sum(shard.tokens for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Replace the one in `folder`; whoever reads it sees the old one or this one."""
        content = {"format": FORMAT, "complete": self.complete, **self._totals(), **asdict(self)}
        replace_file(folder / NAME, json.dumps(content, indent=1).encode() + b"\n")

    def _totals(self) -> dict[str, Any]:
        return {
            "rows": sum(shard.rows for shard in self.shards),
            "rejected": sum(shard.rejected for shard in self.shards),
            "tokens": self.tokens,
            "requests": sum(shard.requests for shard in self.shards),
        }

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The one in `folder`, or None.

        Raises:
            ConfigurationError: It is none of this version's.
        """
        path = folder / NAME
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            return cls(
                job=Job(**content["job"]),
                shards=[Shard(**shard) for shard in content["shards"]],
                seconds=float(content["seconds"]),
                runs=int(content["runs"]),
                dollars=content["dollars"],
                complete=bool(content["complete"]),
            )
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{path} is no manifest of this version ({error!r}): choose another --output."
            ) from error


def check_same(stored: Job, asked: Job, folder: Path) -> None:
    """See that a job goes on as it was begun.

    Raises:
        IdentityMismatchError: The service has other vectors now.
        ConfigurationError: The input, or an option, is another.
    """
    if stored.identity != asked.identity:
        VectorIdentity.from_dict(asked.identity).check(VectorIdentity.from_dict(stored.identity))
    before, now = asdict(stored), asdict(asked)
    differ = [name for name in before if before[name] != now[name]]
    if not differ:
        return
    if "files" in differ:
        said = _changed_files(stored.files, asked.files)
    else:
        said = "; ".join(f"{name} was {before[name]!r}, and is {now[name]!r}" for name in differ)
    raise ConfigurationError(
        f"{folder} holds another job: {said}. Name another --output: what is finished here stays "
        "good. Or remove it."
    )


def _changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    gone, new = [*(before.keys() - now.keys())], [*(now.keys() - before.keys())]
    changed = [name for name in before.keys() & now.keys() if before[name] != now[name]]
    parts = {"changed": changed, "missing": gone, "new": new}
    return (
        "; ".join(
            f"{what} input: {', '.join(sorted(names)[:3])}{' and more' if len(names) > 3 else ''}"
            for what, names in parts.items()
            if names
        )
        or "the input files are in another order"
    )


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, path)


def rename(temporary: Path, path: Path) -> None:
    """Give a synced file its name, for good."""
    temporary.replace(path)
    if os.name == "posix":  # or the name may be lost in a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
