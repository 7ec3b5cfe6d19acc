"""Document IDs: which rows have none, and which have one that occurred before."""

from __future__ import annotations

import math
from collections.abc import Iterator
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.readers.blocks import Block

if TYPE_CHECKING:
    from kalm_integrations.bulk.plan import Plan

SHOWN: Final = 5  # bad rows, or repeated IDs, that are named
Keys = NDArray[np.uint64]
"""Digests, shape (n, 2)."""


_NO_ID: Final = b"\xff" * 16


def id_strings(column: pa.Array | pa.ChunkedArray) -> list[str | None]:
    """A column's values as document IDs.

    Raises:
        ConfigurationError: Its type makes no IDs.
    """
    kind = column.type
    if pa.types.is_nested(kind):
        raise ConfigurationError(f"--id-column: a column of {kind} cannot be the document ID.")
    if pa.types.is_dictionary(kind):
        column = pc.cast(column, kind.value_type)
    if pa.types.is_temporal(kind):  # Python has not all dates that Arrow has
        column = pc.cast(column, pa.string() if not pa.types.is_duration(kind) else pa.int64())
    return [None if _is_missing(value) else str(value) for value in column.to_pylist()]


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def keys_of(block: Block, name: str, constants: dict[str, Any]) -> bytes:
    """A digest of each row's ID; `_NO_ID` where it has none."""
    if block.batch is not None and name in block.batch.schema.names:
        values: list[Any] = id_strings(block.batch.column(name))
    elif name in constants and not any(name in record for record in block.records):
        values = [constants[name][1].get(block.file)] * len(block)
    else:
        values = [record.get(name) for record in block.records]
        # One column may have both 7 and 7.0, which are one number.
        values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
    return b"".join(
        _NO_ID if v == "" or _is_missing(v) else sha256(str(v).encode()).digest()[:16]
        for v in values
    )


def check(plan: Plan, ids: Keys) -> None:
    """Refuse null and repeated IDs of rows that get a vector."""
    good = np.flatnonzero(plan.first >= 0)
    missing = good[(ids[good] == np.uint64(2**64 - 1)).all(axis=1)]
    name = plan.options.id_column
    if len(missing):
        shown = ", ".join(place for place, _ in _located(plan, missing[:SHOWN].tolist()))
        raise ConfigurationError(
            f"--id-column {name}: {len(missing):,} of {plan.rows:,} rows have no ID: {shown}"
            f"{' and more' if len(missing) > SHOWN else ''}. Nothing was sent. Give each row an "
            "ID, or leave out --id-column."
        )
    repeated = good[first_of_each(ids[good]) != np.arange(len(good))]
    if len(repeated) and not plan.options.allow_duplicate_ids:
        shown = ", ".join(
            f"{value!r} ({place})" for place, value in _located(plan, repeated[:SHOWN].tolist())
        )
        raise ConfigurationError(
            f"--id-column {name}: {len(repeated):,} of {plan.rows:,} rows have an ID that occurred "
            f"before: {shown}{' and more' if len(repeated) > SHOWN else ''}. Nothing was sent. A "
            "store keeps one row of each ID; --allow-duplicate-ids embeds them nevertheless."
        )


def _located(plan: Plan, wanted: list[int]) -> Iterator[tuple[str, str | None]]:
    """Place and ID of some rows, which are read again."""
    row, left = 0, list(wanted)
    for index, rows in enumerate(plan.file_rows):
        if not left or row + rows <= left[0]:
            row += rows
            continue
        for block in plan.same_blocks(index):
            while left and left[0] < row + len(block):
                at = left.pop(0) - row
                column = block.column(str(plan.options.id_column), plan.schema)
                yield block.places[at], id_strings(column.slice(at, 1))[0]
            row += len(block)
            if not left:
                return


def first_of_each(keys: Keys) -> NDArray[np.int64]:
    """For each key, the position at which it occurs first."""
    high, low = keys.T
    order = np.lexsort((low, high))  # stable: of equal keys, the first comes first
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
    starts = np.flatnonzero(new)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = np.repeat(order[starts], np.diff(np.append(starts, len(order))))
    return first
