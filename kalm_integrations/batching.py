"""Group texts into requests, and map the rows of responses back to the texts' indices.

Plain functions and data: no I/O, no threads. Every distinct text keeps the positions of all
its copies, from the plan to the response.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from kalm_integrations import prompts
from kalm_integrations.errors import InvalidText
from kalm_integrations.result import EmbeddedBatch, Usage

T = TypeVar("T")
_BLOCK: Final = 8192  # texts that `iter_embed` reads ahead and searches for copies


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """How much goes into one request.

    Attributes:
        texts: `batch_size`. 128 float16 vectors of 3840 dimensions are 0.94 MiB, 128 float32
            ones 1.9 MiB: under Modal's 2 MiB limit for an answer that needs no blob.
        bytes: UTF-8 bytes of all texts.
        tokens: Estimated tokens, about 2 s of one H100's time at 26,000 tokens/s, because a
            running request cannot be cancelled everywhere.
        text_tokens: The most that one text counts, because the model reads no more of it.
        characters: Where a text is cut; None sends it whole.
    """

    texts: int = 128
    bytes: int = 4 * 2**20
    tokens: int = 50_000
    text_tokens: int = 8192
    characters: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One request's texts.

    Attributes:
        texts: Distinct texts, with the instruction.
        positions: For each text, every index in the caller's list that holds it, first first.
        rejected: Invalid texts; their batch has no others.
    """

    texts: list[str]
    positions: list[list[int]]
    rejected: tuple[InvalidText, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def halves(self) -> tuple[Batch, Batch]:
        """The batch as two, for a service that refuses requests of its size."""
        middle = len(self) // 2
        return (
            Batch(self.texts[:middle], self.positions[:middle]),
            Batch(self.texts[middle:], self.positions[middle:]),
        )

    def without(self, rows: Iterable[int]) -> Batch:
        """The batch without the texts of `rows`."""
        dropped = set(rows)
        rest = [row for row in range(len(self)) if row not in dropped]
        return Batch([self.texts[row] for row in rest], [self.positions[row] for row in rest])

    def locate(self, invalid: Iterable[InvalidText]) -> list[InvalidText]:
        """Translate rows of this batch to all indices of their texts in the caller's list."""
        located = [
            InvalidText(index, bad.reason) for bad in invalid for index in self.positions[bad.index]
        ]
        return sorted(located, key=lambda bad: bad.index)

    def scatter(
        self,
        vectors: NDArray[np.floating[Any]],
        usage: Usage,
        truncated: tuple[int, ...] | None = (),
    ) -> EmbeddedBatch:
        """The rows of `vectors`, and the texts that were cut, with the caller's indices, copies
        included."""
        flat = [index for places in self.positions for index in places]
        if len(flat) > len(vectors):
            vectors = np.repeat(vectors, [len(places) for places in self.positions], axis=0)
        if truncated:
            truncated = tuple(index for row in truncated for index in self.positions[row])
        return EmbeddedBatch(np.array(flat, dtype=np.int64), vectors, usage, truncated=truncated)


def plan(texts: Iterable[tuple[int, str]], template: str, limits: RequestLimits) -> Iterator[Batch]:
    """Group (index, text) pairs into requests: in order, each distinct text once.

    Args:
        texts: Texts with their indices in the caller's list.
        template: Instruction with `{text}`; see `prompts`.
        limits: No request exceeds them, except one of a single text.
    """
    places: dict[str, list[int]] = {}
    for index, text in texts:
        places.setdefault(text, []).append(index)

    batch, size, tokens = Batch([], []), 0, 0
    for text, positions in places.items():
        prompted = template.replace(prompts.PLACEHOLDER, text, 1)[: limits.characters]
        text_size = len(prompted) if prompted.isascii() else len(prompted.encode())
        text_tokens = min(estimate_tokens(text_size), limits.text_tokens)
        full = (
            len(batch.texts) == limits.texts
            or size + text_size > limits.bytes
            or tokens + text_tokens > limits.tokens
        )
        if batch.texts and full:
            yield batch
            batch, size, tokens = Batch([], []), 0, 0
        batch.texts.append(prompted)
        batch.positions.append(positions)
        size += text_size
        tokens += text_tokens
    if batch.texts:
        yield batch


def estimate_tokens(utf8_bytes: int) -> int:
    """Estimate the tokens of a text: 4 bytes per token fit both English and Chinese."""
    return utf8_bytes // 4 + 1


def numbered_blocks(texts: Iterable[T]) -> Iterator[list[tuple[int, T]]]:
    """Read `texts` in blocks, with their indices."""
    numbered = enumerate(texts)
    while block := list(islice(numbered, _BLOCK)):
        yield block
