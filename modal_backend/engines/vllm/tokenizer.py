"""Turns texts into token ids with the model's own tokenizer, queries before documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from kalm_integrations.errors import EngineLoadError, InputTooLongError, InvalidText
from kalm_integrations.protocol import Truncate
from modal_backend.engines.compute_thread import ComputeThread
from modal_backend.engines.long_texts import long_enough_prefix, too_long
from modal_backend.engines.priority_lock import PriorityLock, chunks

CHUNK_TEXTS: Final = 64
"""Texts that are tokenized, or passed to vLLM, without interruption: the event loop and a new query
may have to wait for them."""
_CHUNK_TOKENS: Final = 16_384


class Tokenizer:
    """The model's tokenizer. Unlike vLLM's, it names every text that is too long, counts exactly,
    keeps the special tokens at the end of a cut text, and reads "<eos>" in a text as plain text.

    Args:
        fast: A tokenizer of transformers, backed by the `tokenizers` library. It is changed.
        max_tokens: Longest text, including its special tokens.

    Raises:
        EngineLoadError: The model has no such tokenizer.
    """

    def __init__(self, fast: Any, max_tokens: int) -> None:
        backend = getattr(fast, "backend_tokenizer", None)
        if backend is None:
            raise EngineLoadError("the model has no tokenizer.json, which this engine needs.")
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # as plain text, where a text contains them
        self._backend = backend
        self._max_tokens = max_tokens
        self._special = backend.num_special_tokens_to_add(is_pair=False)
        self._lock = PriorityLock()
        self._thread = ComputeThread("kalm-tokenizer")

    async def tokenize(
        self, texts: Sequence[str], priority: int, truncate: Truncate
    ) -> tuple[list[list[int]], list[int]]:
        """Return the token ids of `texts`, and their tokens before they are cut; or raise an
        `InputTooLongError`."""
        ticket = self._lock.ticket(priority)
        token_ids: list[list[int]] = []
        counts: list[int] = []
        invalid: list[InvalidText] = []
        for start, chunk in chunks(texts, max_texts=CHUNK_TEXTS, max_tokens=_CHUNK_TOKENS):
            async with self._lock.hold(ticket):
                ids, tokens, bad = await self._thread.run(self.encode, chunk, truncate, start)
            token_ids += ids
            counts += tokens
            invalid += bad
        if invalid:
            raise InputTooLongError.of(invalid)
        return token_ids, counts

    def close(self) -> None:
        """End the thread."""
        self._thread.stop()

    def encode(
        self, texts: Sequence[str], truncate: Truncate, start: int
    ) -> tuple[list[list[int]], list[int], list[InvalidText]]:
        """Token ids of `texts`; their tokens before they are cut; those that are too long, their
        indices counted from `start`."""
        capacity = self._max_tokens - self._special
        prefixes = [long_enough_prefix(text, self._count, capacity) for text in texts]
        encodings = self._backend.encode_batch_fast(
            [prefix for prefix, _ in prefixes], add_special_tokens=False
        )
        invalid: list[InvalidText] = []
        ids: list[list[int]] = []
        counts: list[int] = []
        for index, (encoding, (_, estimate)) in enumerate(zip(encodings, prefixes, strict=True)):
            tokens = (estimate or len(encoding)) + self._special
            counts.append(tokens)
            if tokens > self._max_tokens and truncate == "error":
                exact = estimate is None
                invalid.append(too_long(start + index, tokens, self._max_tokens, exact=exact))
                continue
            encoding.truncate(capacity)
            ids.append(self._backend.post_process(encoding).ids)
        return ids, counts, invalid

    def _count(self, text: str) -> int:
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return len(encoding)
