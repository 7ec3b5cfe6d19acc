"""The plan of a job: one pass over the input before anything is sent.

It counts rows, finds rows that cannot be embedded, identical texts and repeated ids, and keeps a
digest of every block, so that the second pass knows whether it reads what was planned. It keeps 28
bytes a row.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from typing import Any, Final

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from kalm_integrations.batching import estimate_tokens
from kalm_integrations.bulk import ids
from kalm_integrations.bulk.manifest import Job
from kalm_integrations.bulk.options import Options
from kalm_integrations.bulk.parts import Part
from kalm_integrations.bulk.shards import TRUNCATED
from kalm_integrations.errors import BadRowsError, ConfigurationError
from kalm_integrations.protocol import Truncate
from kalm_integrations.readers.blocks import Block, Schema
from kalm_integrations.readers.files import manifest_names, partitions
from kalm_integrations.readers.json_columns import lacks
from kalm_integrations.readers.source import Source
from kalm_integrations.validation import why_invalid

_OURS: Final = "kalm:"


@dataclass(frozen=True, slots=True)
class Plan:
    """What there is to embed.

    Attributes:
        bad: Rows that cannot be embedded, as far as that is known before; `examples` names some.
        first: For each row, the row that has its text first; -1 of a bad row.
        keys: Digest of each row's text.
        files: A digest of each file.
        block_digests: Of each file, a digest of each of its blocks.
    """

    source: Source
    options: Options
    truncate: Truncate
    rows: int
    bad: int
    examples: tuple[str, ...]
    first: NDArray[np.int64] = field(repr=False)
    keys: ids.Keys = field(repr=False)
    row_tokens: NDArray[np.uint32] = field(repr=False)
    files: dict[str, str]
    file_rows: list[int] = field(repr=False)
    block_digests: list[list[bytes]] = field(repr=False)
    schema: Schema

    @property
    def is_first(self) -> NDArray[np.bool_]:
        """The rows whose texts have not occurred before."""
        return np.equal(self.first, np.arange(self.rows))

    @property
    def distinct(self) -> int:
        """Texts that are embedded."""
        return int(self.is_first.sum())

    @property
    def tokens(self) -> int:
        """Estimated tokens of the distinct texts."""
        return int(self.row_tokens[self.is_first].sum())

    @property
    def columns(self) -> list[str]:
        """The columns that shards have beside vectors."""
        replaced = self.options.vector_columns if self.options.replace_vector else []
        return [name for name in self.schema.arrow.names if name not in replaced]

    def job(self, identity: dict[str, Any], vector_dtype: Any) -> Job:
        """Everything that decides the output."""
        return Job(
            files=self.files,
            text_column=self.source.text_column,
            id_column=self.options.id_column,
            vector_column=self.options.vector_column,
            rows=self.rows,
            identity=identity,
            vector_dtype=vector_dtype,
            truncate=self.truncate,
            on_error=self.options.on_error,
            shard_rows=self.options.shard_rows,
            encoding=self.source.encoding,
            also=self.options.also,
        )

    def parts(self, begin: int = 0) -> Iterator[Part]:
        """Read the input again, from part `begin` on; part n is what shard n is made from.

        Raises:
            ConfigurationError: The input has changed since it was planned.
        """
        for number, pieces in groupby(self._pieces(begin), key=itemgetter(0)):
            yield self._part(number, [piece[1:] for piece in pieces])

    def _pieces(self, begin: int) -> Iterator[tuple[int, Block, int, int]]:
        """(part, block, its first row in that part, the row after its last)."""
        size, row = self.options.shard_rows, 0
        for index, rows in enumerate(self.file_rows):
            if row + rows <= begin * size:
                row += rows
                continue
            for block in self.same_blocks(index):
                after = row + len(block)
                for number in range(max(begin, row // size), -(-after // size)):
                    first, end = number * size, (number + 1) * size
                    yield number, block, max(0, first - row), min(len(block), end - row)
                row = after

    def same_blocks(self, index: int) -> Iterator[Block]:
        file, rows = self.source.files[index], 0
        changed = ConfigurationError(
            f"{file} changed after it was planned. What is finished stays. Run the command again "
            "with the file as it was, or choose another --output."
        )
        digests = iter(self.block_digests[index])
        for block in self.source.blocks(file):
            rows += len(block)
            if next(digests, None) != block.digest or rows > self.file_rows[index]:
                raise changed
            yield block
        if rows != self.file_rows[index] or next(digests, None) is not None:
            raise changed

    def _part(self, number: int, pieces: list[tuple[Block, int, int]]) -> Part:
        start = number * self.options.shard_rows
        tables: list[pa.Table] = []
        texts: list[Any] = []
        places: list[str] = []
        reasons: dict[int, str] = {}
        for block, begin, end in pieces:
            table = block.table(self.schema, self.columns)
            tables.append(table.slice(begin, end - begin))
            for row in range(begin, end):
                if self.first[start + len(texts)] < 0:
                    reason = block.problems.get(row) or why_invalid(block.texts[row], self.truncate)
                    reasons[len(texts)] = reason or "is a bad row"
                texts.append(block.texts[row])
                places.append(block.places[row])
        rows = slice(start, start + len(texts))
        return Part(
            number=number,
            start=start,
            columns=pa.concat_tables(tables),
            places=places,
            texts=texts,
            reasons=reasons,
            first=self.first[rows],
            keys=self.keys[rows],
            tokens=int(self.row_tokens[rows].sum()),
        )


def make_plan(
    source: Source,
    truncate: Truncate,
    options: Options,
    seen: Callable[[int], object],
    *,
    refuse_bad: bool = True,
) -> Plan:
    """Read everything once, and check that it can be embedded as the options say.

    Args:
        source: What to read.
        truncate: Whether texts that no model takes are cut rather than refused.
        options: Of the job.
        seen: Called with the number of rows that were read since the last call.
        refuse_bad: Whether bad rows are an error; else they are counted only.

    Raises:
        ConfigurationError: There is nothing, or it cannot be read, or a column is missing or taken.
        BadRowsError: Rows cannot be embedded and on_error is "fail"; or no row can.
    """
    if source.kind == "parquet":
        source.schema()  # broken files are named before anything is read
    constants = partitions(source.files)
    keys, id_keys, tokens = bytearray(), bytearray(), array("I")
    digests: list[list[bytes]] = []
    file_rows: list[int] = []
    examples: list[str] = []
    rows = bad = 0
    for file in source.files:
        begin = rows
        digests.append([])
        for block in source.blocks(file):
            problems = block.problems
            for row, text in enumerate(block.texts):
                reason = (problems and problems.get(row)) or why_invalid(text, truncate)
                if reason is None:
                    content = text.encode()
                    keys += sha256(content).digest()[:16]
                    tokens.append(estimate_tokens(len(content)))
                    continue
                bad += 1
                if len(examples) < ids.SHOWN:
                    examples.append(f"{block.places[row]} {reason}")
                keys += b"\xff" * 8 + (rows + row).to_bytes(8, "little")  # as no other row
                tokens.append(0)
            digests[-1].append(block.digest)
            if options.id_column is not None:
                id_keys += ids.keys_of(block, options.id_column, constants)
            rows += len(block)
            seen(len(block))
        file_rows.append(rows - begin)
    names = manifest_names(source.files)
    if not rows:
        raise ConfigurationError(f"{', '.join(names[: ids.SHOWN])}: no text at all.")
    key_array = np.frombuffer(keys, dtype="<u8").reshape(-1, 2)
    row_tokens = np.frombuffer(tokens, dtype=np.uint32)
    first = np.where(row_tokens > 0, ids.first_of_each(key_array), -1)
    plan = Plan(
        source=source,
        options=options,
        truncate=truncate,
        rows=rows,
        bad=bad,
        examples=tuple(examples),
        first=first,
        keys=key_array,
        row_tokens=row_tokens,
        files={
            name: xxhash.xxh3_128_hexdigest(
                b"".join(blocks if source.kind == "parquet" else blocks[-1:])
            )
            for name, blocks in zip(names, digests, strict=True)
        },
        file_rows=file_rows,
        block_digests=digests,
        schema=source.schema().with_nulls() if bad else source.schema(),
    )
    _check_columns(plan)
    if refuse_bad:
        _check_rows(plan)
    if options.id_column is not None:
        ids.check(plan, np.frombuffer(id_keys, dtype="<u8").reshape(-1, 2))
    return plan


def _check_columns(plan: Plan) -> None:
    names, options = plan.schema.arrow.names, plan.options
    if options.id_column is not None and options.id_column not in names:
        raise ConfigurationError(f"{lacks(options.id_column, names, '--id-column')}.")
    if options.vector_column in (plan.source.text_column, options.id_column):
        raise ConfigurationError(f"--vector-column {options.vector_column}: name another column.")
    if taken := [name for name in options.vector_columns if name in plan.columns]:
        raise ConfigurationError(
            f"the input has a column {taken[0]!r} already: --vector-column NAME puts "
            "the vectors into another one, --replace-vector drops the input's."
        )
    if plan.truncate == "end" and TRUNCATED in (*plan.columns, options.vector_column):
        raise ConfigurationError(
            f"column {TRUNCATED!r} is for cut texts: rename the input's, or the one for vectors."
        )
    if taken := [name for name in names if name.startswith(_OURS)]:
        raise ConfigurationError(f"column {taken[0]!r}: names with {_OURS!r} are reserved.")


def _check_rows(plan: Plan) -> None:
    if plan.distinct and not (plan.bad and plan.options.on_error == "fail"):
        return
    more = plan.bad - len(plan.examples)
    raise BadRowsError(
        f"{plan.bad:,} of {plan.rows:,} {'row' if plan.rows == 1 else 'rows'} cannot be embedded: "
        f"{'; '.join(plan.examples)}{f'; and {more:,} more' if more else ''}. Nothing was sent."
    )
