"""Very long texts are tokenized only in part."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from serving import embedded_engine

from modal_backend.engines.embedded import MAX_TOKENS, EmbeddedEngine
from modal_backend.engines.long_texts import long_enough_prefix


class Words:
    """A tokenizer whose tokens are words; counts the characters that it has read."""

    def __init__(self) -> None:
        self.characters = 0

    def count(self, text: str) -> int:
        self.characters += len(text)
        return len(text.split())


@pytest.mark.parametrize("words", [0, 1, 2_000, 10_000, 50_000])
def test_only_a_prefix_is_counted(words: int) -> None:
    text, tokenizer = "abcd " * words, Words()
    enough, about = long_enough_prefix(text, tokenizer.count, 10_000)
    assert text.startswith(enough)
    if about is None:
        assert enough == text
        assert words <= 13_000
    else:
        assert tokenizer.count(enough) > 10_000
        assert about == pytest.approx(words, rel=0.05)
    assert tokenizer.characters < 150_000


@pytest.fixture(scope="module")
def engine() -> EmbeddedEngine:
    return embedded_engine()


@pytest.mark.parametrize(
    "alphabet",
    ["abcdefghij    ", "\ufdfa \u33a5ab", "日本語猫山 。", "a\u0301 ", " \u200b\tab", "0123.,"],
)
def test_a_truncated_text_has_the_first_tokens_of_the_whole(
    engine: EmbeddedEngine, alphabet: str
) -> None:
    text = "".join(random.Random(alphabet).choices(alphabet, k=60_000))
    whole = engine._tokenizer.encode(text, out_type=int, add_bos=True, add_eos=True)
    assert len(whole) > MAX_TOKENS
    ((cut,), _, too_long) = engine._tokenize([text], "end", 0)
    assert not too_long
    assert cut == [*whole[: MAX_TOKENS - 1], whole[-1]]
    (nothing, _, (refused,)) = engine._tokenize([text], "error", 7)
    assert (nothing, refused.index) == ([], 7)


def test_few_expanding_characters_are_tokenized(engine: EmbeddedEngine) -> None:
    read: list[int] = []
    encode = engine._tokenizer.encode
    engine._tokenizer.encode = lambda text, **o: (read.append(len(text)), encode(text, **o))[1]
    try:
        for truncate in ("end", "error"):
            engine._tokenize(["\ufdfa" * 262_144], truncate, 0)  # type: ignore[arg-type]
    finally:
        engine._tokenizer.encode = encode
    assert sum(read) < 40_000


def test_texts_near_the_limit_are_counted_exactly(engine: EmbeddedEngine) -> None:
    fits = "word " * (MAX_TOKENS - 2)
    lengths = [len(engine._tokenize([text], "error", 0)[0]) for text in (fits, fits + "word")]
    assert [before - after for before, after in pairwise(lengths)] == [1]
