"""One pass over the input before anything is sent: how much there is, what cannot be embedded,
which texts recur, and a digest by which a changed input is known.

What stays in memory is 24 bytes a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kalm_integrations.batching import estimate_tokens
from kalm_integrations.bulk.columns import Columns, parquet_schema
from kalm_integrations.bulk.sources import BLOCK_ROWS, Row, Source
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.protocol import Truncate
from kalm_integrations.validation import why_invalid

_KEPT: Final = 5  # bad rows that are named


@dataclass(frozen=True, slots=True)
class Scan:
    """What the pass has found.

    Attributes:
        rows: All of them, bad ones too.
        tokens: Estimated, of texts that are embedded: each distinct one once.
        distinct: Texts that are embedded.
        bad: How many rows cannot be embedded, as far as can be told here.
        examples: The first of them, each with its place and reason.
        first: For each row, the row that has its text first; -1 of a bad row.
        files: Digest of each file, by its name.
        columns: How the columns are kept.
        schema: Their types.
    """

    rows: int
    tokens: int
    distinct: int
    bad: int
    examples: tuple[str, ...]
    first: NDArray[np.int64] = field(repr=False)
    files: dict[str, str]
    columns: Columns
    schema: pa.Schema


def reason_of(row: Row, truncate: Truncate) -> str | None:
    """Why a row cannot be embedded, or None."""
    return row.unreadable or why_invalid(row.text, truncate)


def scan(source: Source, truncate: Truncate, seen: Callable[[int], object]) -> Scan:
    """Read everything once.

    Args:
        source: What to read.
        truncate: Whether texts that no model takes are cut rather than refused.
        seen: Called with numbers of rows as they are read.

    Raises:
        ConfigurationError: There is nothing, or it cannot be read as a whole.
    """
    columns = Columns(source.text_column)
    schema = parquet_schema(source) if source.kind == "parquet" else None
    keys, sizes = bytearray(), bytearray()
    files: dict[str, str] = {}
    rows = bad = 0
    examples: list[str] = []
    for file in source.files:
        files[source.name(file)] = digest(file)
        for row in source.rows(file):
            if schema is None:
                columns.see(row.columns)
            reason = reason_of(row, truncate)
            if reason is None:
                content = row.text.encode()
                keys += hashlib.blake2b(content, digest_size=16).digest()
                sizes += estimate_tokens(len(content)).to_bytes(8, "little")
            else:
                bad += 1
                if len(examples) < _KEPT:
                    examples.append(f"{row.place} {reason}")
                keys += (2**64 - 1).to_bytes(8, "little") + rows.to_bytes(8, "little")
                sizes += bytes(8)
            rows += 1
            if rows % BLOCK_ROWS == 0:
                seen(BLOCK_ROWS)
    seen(rows % BLOCK_ROWS)
    if not rows:
        raise ConfigurationError(f"{', '.join(files)}: no text at all.")
    first, tokens = _first_of_each(keys), np.frombuffer(sizes, dtype="<u8")
    valid = tokens > 0
    distinct = valid & (first == np.arange(rows))
    first = np.where(valid, first, -1)
    return Scan(
        rows=rows,
        tokens=int(tokens[distinct].sum()),
        distinct=int(distinct.sum()),
        bad=bad,
        examples=tuple(examples),
        first=first,
        files=files,
        columns=columns,
        schema=columns.schema() if schema is None else schema,
    )


def _first_of_each(keys: bytearray) -> NDArray[np.int64]:
    """For each key of 16 bytes, where it is for the first time."""
    high, low = np.frombuffer(keys, dtype="<u8").reshape(-1, 2).T
    order = np.lexsort((low, high))  # stable: of equal keys, the first comes first
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
    starts = np.flatnonzero(new)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = np.repeat(order[starts], np.diff(np.append(starts, len(order))))
    return first


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
