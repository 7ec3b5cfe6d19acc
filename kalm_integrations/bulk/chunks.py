"""The input a second time, in blocks of a shard's rows: it has to be what was scanned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from kalm_integrations.bulk.scan import Scan, reason_of
from kalm_integrations.bulk.sources import Row, Source
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.protocol import Truncate


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one shard.

    Attributes:
        number: The shard, counted from 0.
        start: Its first row in the input.
        rows: Its rows.
        reasons: Why a row cannot be embedded, by its place within the block.
    """

    number: int
    start: int
    rows: list[Row]
    reasons: dict[int, str]

    @property
    def places(self) -> list[str]:
        """Where the rows are, for people."""
        return [row.place for row in self.rows]


def blocks(
    source: Source, found: Scan, shard_rows: int, truncate: Truncate, begin: int = 0
) -> Iterator[Block]:
    """Read the input again, from shard `begin` on.

    Raises:
        ConfigurationError: It changed since it was scanned.
    """
    rows = chain.from_iterable(source.rows(file) for file in source.files)
    start = sum(1 for _ in islice(rows, begin * shard_rows))
    for number in range(begin, -(-found.rows // shard_rows)):
        block = list(islice(rows, shard_rows))
        if len(block) < min(shard_rows, found.rows - start):
            raise ConfigurationError("the input became shorter while it was read.")
        reasons: dict[int, str] = {}
        first = found.first[start : start + len(block)].tolist()
        for place, (origin, row) in enumerate(zip(first, block, strict=True)):
            reason = reason_of(row, truncate)
            if (origin < 0) != (reason is not None):
                raise ConfigurationError(f"{row.place} changed while the input was read.")
            if reason is not None:
                reasons[place] = reason
        yield Block(number, start, block, reasons)
        start += len(block)
    if next(rows, None) is not None:
        raise ConfigurationError("the input became longer while it was read.")
