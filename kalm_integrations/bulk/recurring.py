"""Texts that recur in later shards: their vectors are computed once, and kept in a file."""

from __future__ import annotations

import numpy as np

from kalm_integrations.bulk.plan import Plan
from kalm_integrations.bulk.shards import ShardBuilder
from kalm_integrations.bulk.vectors import VectorFile


class RecurringTexts:
    """Gives rows the vectors of earlier shards. A shard is kept when all of its vectors are there.

    Args:
        plan: It says which texts recur.
        file: Of their vectors.
        refused: Why finished shards have no vector of a text, by its row of the input.
    """

    def __init__(self, plan: Plan, file: VectorFile, refused: dict[int, str]) -> None:
        first, size = plan.first, plan.options.shard_rows
        later = (first >= 0) & (np.arange(plan.rows) // size != first // size)
        self._rows = np.unique(first[later])
        self._refused, self._file = refused, file
        self.sync, self.close = file.sync, file.close

    def copy(self, builder: ShardBuilder) -> tuple[int, list[tuple[int, str]]]:
        """How many rows got the vector of an earlier shard; and texts whose vector was lost."""
        rows = builder.copied_rows()
        first = builder.part.first[rows]
        for row, origin in zip(rows.tolist(), first.tolist(), strict=True):
            if reason := self._refused.get(origin):
                builder.reasons[row] = reason
        good = np.array([row not in builder.reasons for row in rows.tolist()], dtype=np.bool_)
        rows, slots = rows[good], np.searchsorted(self._rows, first[good])
        found, vectors, cut = self._file.get(slots, builder.part.keys[rows])
        builder.vectors[rows[found]], builder.truncated[rows[found]] = vectors[found], cut[found]
        return int(found.sum()), [(row, builder.part.texts[row]) for row in rows[~found].tolist()]

    def keep(self, builder: ShardBuilder) -> None:
        """Keep what later shards need of this one."""
        part = builder.part
        new = builder.reasons.keys() - part.reasons.keys()
        self._refused |= {part.start + row: builder.reasons[row] for row in new}
        begin, end = np.searchsorted(self._rows, [part.start, part.start + len(part)])
        rows, slots = self._rows[begin:end] - part.start, np.arange(begin, end)
        good = np.array([row not in builder.reasons for row in rows.tolist()], dtype=np.bool_)
        rows, slots = rows[good], slots[good]
        self._file.put(slots, part.keys[rows], builder.vectors[rows], builder.truncated[rows])
