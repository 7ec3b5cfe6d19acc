"""How a corpus is embedded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.readers.json_columns import is_unicode

OnError = Literal["fail", "skip", "null"]
Also = Literal["int8"]
SHARD_ROWS: Final = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a corpus is embedded.

    Attributes:
        text_column: Of Parquet, JSON Lines and CSV, the column that is embedded; None is "text".
        id_column: The column used as the document ID by stores.
        on_error: Of rows that cannot be embedded: "fail" before anything is sent, as far as that
            can be known; "skip" leaves them out; "null" keeps them with a null vector. With the
            latter two they are in `rejected.parquet`, with their reasons.
        shard_rows: Input rows of each shard; 8,192 vectors of 3840 float16 are 60 MiB. Three
            shards are in memory.
        encoding: Of CSV and text files; None is UTF-8.
        allow_duplicate_ids: Accept ids that occur more than once.
        vector_column: The column that gets the vectors.
        replace_vector: Drop a column of that name from the input.
        also: Write the vectors in this type too, into a column named `vector_column` + "_int8".
        reuse: Outputs of complete jobs whose vectors are used again.
        dollars_per_second: Of the GPU that computes, for the job's cost.
        max_dollars: Stop at a finished shard before the job costs more.
        max_hours: The same, for the hours that embedding takes.
    """

    text_column: str | None = None
    id_column: str | None = None
    on_error: OnError = "fail"
    shard_rows: int = SHARD_ROWS
    encoding: str | None = None
    allow_duplicate_ids: bool = False
    vector_column: str = "vector"
    replace_vector: bool = False
    also: Also | None = None
    reuse: tuple[str, ...] = ()
    dollars_per_second: float | None = None
    max_dollars: float | None = None
    max_hours: float | None = None

    def __post_init__(self) -> None:
        if self.on_error not in get_args(OnError) or self.shard_rows < 1:
            raise ConfigurationError(
                f"on_error={self.on_error!r}, shard_rows={self.shard_rows}: on_error is one of "
                f"{', '.join(get_args(OnError))}, and a shard has one row at least."
            )
        for name in ("text_column", "id_column", "vector_column"):
            column = getattr(self, name)
            if column == "" or not is_unicode(column or "none"):
                raise ConfigurationError(
                    f"{name}={column!r} is no column's name: name one in UTF-8, or leave it out."
                )

    @property
    def vector_columns(self) -> list[str]:
        """The columns that a job writes vectors into."""
        return [self.vector_column, *([int8_column(self.vector_column)] if self.also else [])]


def int8_column(vector_column: str) -> str:
    """The column for int8, beside that for vectors."""
    return f"{vector_column}_int8"
