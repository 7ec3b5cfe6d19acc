"""Texts to token ids, by the model's own tokenizer: exactly what the model shall read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kalm_integrations.errors import EngineLoadError, InvalidText
from kalm_integrations.protocol import Truncate
from modal_backend.engines.long_texts import beginning, reason


class Tokenizer:
    """The model's tokenizer, told to take a text as text.

    Tokenizing here, and not in vLLM, names every text that is too long, counts exactly, keeps the
    special tokens at a cut text's end, and takes "<eos>" in a text for five characters.

    Args:
        fast: A tokenizer of transformers, backed by the `tokenizers` library. It is changed.
        max_tokens: Longest text, the special tokens around it included.

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
        self._room = max_tokens - backend.num_special_tokens_to_add(is_pair=False)

    def encode(
        self, texts: Sequence[str], truncate: Truncate, start: int
    ) -> tuple[list[list[int]], list[InvalidText]]:
        """Token ids of `texts`; those that are too long, their indices counted from `start`."""
        read = [beginning(text, self._count, self._room) for text in texts]
        encoded = self._backend.encode_batch_fast(
            [enough for enough, _ in read], add_special_tokens=False
        )
        too_long: list[InvalidText] = []
        ids: list[list[int]] = []
        for row, (encoding, (_, about)) in enumerate(zip(encoded, read, strict=True), start):
            tokens = len(encoding)
            if tokens > self._room:
                if truncate == "error":
                    over = (about or tokens) + self._max_tokens - self._room
                    why = reason(over, self._max_tokens, exact=about is None)
                    too_long.append(InvalidText(row, why))
                    continue
                encoding.truncate(self._room)
            ids.append(self._backend.post_process(encoding).ids)
        return ids, too_long

    def _count(self, text: str) -> int:
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return len(encoding)
