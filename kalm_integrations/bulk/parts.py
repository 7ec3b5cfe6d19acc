"""Parts: rows on their way in, as they are planned, uploaded and embedded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kalm_integrations.bulk.manifest import Job
from kalm_integrations.bulk.tables import python_texts, read_table, write_table
from kalm_integrations.errors import ConfigurationError

_PLACE, _REASON, _REUSED = "kalm:place", "kalm:reason", "kalm:reused"


@dataclass(frozen=True, slots=True)
class Part:
    """The rows that one shard is made from.

    Attributes:
        number: Of the part and its shard, counted from 0.
        start: Its first row in the input.
        columns: The columns that the shard will have beside vectors.
        places: Where the rows are in the input, for people.
        texts: The text column, whatever its values are.
        reasons: Why rows cannot be embedded, by row of the part.
        first: For each row, the row of the input that has its text first; -1 of a bad row.
        keys: Digest of each row's text; none in a container.
        tokens: Estimated tokens of all rows.
        vectors: Those of another job that are used again, by row; and whether texts were cut.
    """

    number: int
    start: int
    columns: pa.Table = field(repr=False)
    places: list[str] = field(repr=False)
    texts: list[Any] = field(repr=False)
    reasons: dict[int, str]
    first: NDArray[np.int64] = field(repr=False)
    keys: NDArray[np.uint64] = field(repr=False)
    tokens: int = 0
    vectors: dict[int, tuple[NDArray[Any], bool]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.places)

    def write(self, path: Path) -> tuple[int, str]:
        """Write it as a file that `read` reads; its size and digest."""
        reasons = [self.reasons.get(row) for row in range(len(self))]
        table = self.columns.append_column(_PLACE, pa.array(self.places, pa.string()))
        table = table.append_column(_REASON, pa.array(reasons, pa.string()))
        if self.vectors:
            known = [self.vectors.get(row) for row in range(len(self))]
            raw = [None if v is None else bytes([v[1]]) + v[0].tobytes() for v in known]
            table = table.append_column(_REUSED, pa.array(raw, pa.large_binary()))
        return write_table(path, table, vectors=[_REUSED] if self.vectors else [])

    @classmethod
    def read(cls, path: Path, number: int, job: Job, digest: str) -> Part:
        """Read what `write` has written.

        Raises:
            ConfigurationError: The file is damaged, or not a part of this job.
        """
        try:
            table = read_table(path, digest)
            places, given = table[_PLACE].to_pylist(), table[_REASON].to_pylist()
            reasons = {row: reason for row, reason in enumerate(given) if reason is not None}
            texts, reused = python_texts(table[job.text_column]), {}
            if _REUSED in table.column_names:
                raw = enumerate(table[_REUSED].to_pylist())
                dtype = job.vector_dtype
                reused = {n: (np.frombuffer(v[1:], dtype), bool(v[0])) for n, v in raw if v}
        except (KeyError, OSError, pa.ArrowException) as error:
            raise ConfigurationError(f"{path.name} is not an input part ({error}).") from error
        start = number * job.shard_rows
        first = np.arange(start, start + len(places))
        first[list(reasons)] = -1
        return cls(
            number=number,
            start=start,
            columns=table.select([n for n in table.column_names if not n.startswith("kalm:")]),
            places=places,
            texts=texts,
            reasons=reasons,
            first=first,
            keys=np.empty((0, 2), dtype=np.uint64),
            vectors=reused,
        )
