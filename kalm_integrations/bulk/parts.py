"""Input parts: a shard's rows as they will be in the output, in a file of their own, so that
whoever embeds the shard reads nothing else.

Beside the columns a part has each row's place, and the reason of those that cannot be embedded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from kalm_integrations.batching import estimate_tokens
from kalm_integrations.bulk import shards
from kalm_integrations.bulk.chunks import Block, blocks
from kalm_integrations.bulk.manifest import Job
from kalm_integrations.bulk.scan import Scan
from kalm_integrations.bulk.sources import Source
from kalm_integrations.errors import ConfigurationError

_OURS: Final = "kalm:"
_PLACE, _REASON = f"{_OURS}place", f"{_OURS}reason"


@dataclass(frozen=True)
class Part:
    """A shard's input.

    Attributes:
        columns: What the shard will have beside its vectors.
        places: Where the rows are in the input, for people.
        texts: What is embedded, with its row within the shard.
        reasons: Why the other rows are not.
    """

    columns: pa.Table
    places: list[str]
    texts: list[tuple[int, str]]
    reasons: dict[int, str]


def check_columns(found: Scan) -> None:
    """See that a part can have its own columns beside the input's.

    Raises:
        ConfigurationError: The input has one of such a name.
    """
    if taken := [name for name in found.schema.names if name.startswith(_OURS)]:
        raise ConfigurationError(f"column {taken[0]!r}: names that begin with {_OURS!r} are ours.")


def write(path: Path, block: Block, found: Scan) -> int:
    """Write the part of one block.

    Returns:
        About how many tokens its texts have.
    """
    columns = shards.table_of(block.rows, found.columns, found.schema)
    good = {row.text for number, row in enumerate(block.rows) if number not in block.reasons}
    reasons = [block.reasons.get(number) for number in range(len(block.rows))]
    columns = columns.append_column(_PLACE, pa.array(block.places, pa.string()))
    columns = columns.append_column(_REASON, pa.array(reasons, pa.string()))
    shards.write_table(path, columns)
    return sum(estimate_tokens(len(text.encode())) for text in good)


def split(source: Source, found: Scan, job: Job, folder: Path) -> Iterator[tuple[Path, int]]:
    """Write the parts of an input one by one; each file, and about how many tokens it has.

    Raises:
        ConfigurationError: The input changed since it was scanned.
    """
    truncate: Any = job.truncate
    for block in blocks(source, found, job.shard_rows, truncate):
        path = folder / shards.name_of(block.number)
        yield path, write(path, block, found)


def read(path: Path, text_column: str) -> Part:
    """Read a part.

    Raises:
        ConfigurationError: It is none.
    """
    try:
        # One file, and no dataset of the folders above it; and no memory map, which would be an
        # open file of the volume.
        with pq.ParquetFile(path, memory_map=False) as file:
            table = file.read()
        places, found = table[_PLACE].to_pylist(), table[_REASON].to_pylist()
        texts = table[text_column].to_pylist()
    except (KeyError, pa.ArrowInvalid) as error:
        raise ConfigurationError(f"{path.name} is no input part ({error}).") from error
    reasons = {row: reason for row, reason in enumerate(found) if reason is not None}
    return Part(
        columns=table.select([name for name in table.schema.names if not name.startswith(_OURS)]),
        places=places,
        texts=[(row, text) for row, text in enumerate(texts) if row not in reasons],
        reasons=reasons,
    )
