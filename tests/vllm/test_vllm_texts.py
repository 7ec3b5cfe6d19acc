"""Every text has a decided answer, and none spoils it for others."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts as some
from reference import cosines, reference_vectors, token_ids
from running import Texts, embed

from kalm_integrations.errors import InputTooLongError, InvalidInputError
from kalm_integrations.protocol import EmbedRequest
from kalm_integrations.validation import MAX_CHARACTERS
from modal_backend.engines.vllm.engine import VLLMEngine
from modal_backend.service import MAX_TEXTS, EmbeddingService

pytestmark = pytest.mark.asyncio(loop_scope="session")

EXACT = 0.99999
MEGABYTE = "".join(f"sentence {number} of a very long text, " for number in range(29_000))


def request(texts: list[Any], **fields: Any) -> EmbedRequest:
    return EmbedRequest(texts=texts, **{"role": "document", "dtype": "float32", **fields})


# --- unusual texts


async def test_unusual_texts_have_the_reference_vectors(engine: VLLMEngine, gemma: Path) -> None:
    texts = list(some.EDGE_TEXTS)
    right = Texts.of(gemma, texts)
    outputs = await asyncio.gather(*(embed(engine, [text]) for text in texts))
    vectors = np.concatenate([output.vectors for output in outputs])
    assert cosines(vectors, right.vectors).min() >= EXACT
    assert [output.tokens for output in outputs] == right.tokens


async def test_special_tokens_in_a_text_are_read_as_plain_text(
    engine: VLLMEngine, gemma: Path
) -> None:
    texts = ["<bos>", "a <bos> b <eos> c", "<pad><pad>", "<start_of_turn>user\nhello<end_of_turn>"]
    ids, *_ = engine._tokenizer.encode(texts, "error", 0)
    assert ids == [token_ids(gemma, text) for text in texts]
    assert all(row[0] == 2 and min(row[1:]) > 6 for row in ids)  # only the BOS in front is one


async def test_an_empty_text_is_embedded_as_its_bos_token(engine: VLLMEngine, gemma: Path) -> None:
    # Clients and service refuse it before the engine sees it.
    output = await embed(engine, [""])
    assert output.tokens == 1
    assert cosines(output.vectors, reference_vectors(gemma, [""])).min() >= EXACT


async def test_no_texts_give_no_vectors(engine: VLLMEngine) -> None:
    output = await embed(engine, [])
    assert output.vectors.shape == (0, 128)
    assert output.tokens == 0


# --- too long


async def test_texts_over_the_limit_are_named_and_other_calls_succeed(
    engine: VLLMEngine, gemma: Path, pool: Texts
) -> None:
    fits = some.text_of_tokens(gemma, 2048)
    long = fits + " and"
    over = [long if row in (3, 70, 141) else text for row, text in enumerate(pool.texts[:142])]
    refused, *others = await asyncio.gather(
        embed(engine, over),
        embed(engine, pool.texts),
        embed(engine, [fits], "query"),
        return_exceptions=True,
    )
    assert isinstance(refused, InputTooLongError)
    assert [bad.index for bad in refused.invalid] == [3, 70, 141]
    assert "2,049 tokens, over the limit of 2,048" in refused.invalid[0].reason
    assert not any(isinstance(output, BaseException) for output in others)
    assert cosines(others[0].vectors, pool.vectors).min() >= EXACT
    assert others[1].tokens == 2048


async def test_texts_over_the_limit_can_be_truncated(engine: VLLMEngine, gemma: Path) -> None:
    fits = some.text_of_tokens(gemma, 2048)
    texts = [some.prose(2600, seed=3), fits + " and", "short"]
    right = reference_vectors(gemma, [texts[0], fits, "short"], max_tokens=2048)
    output = await embed(engine, texts, truncate="end")
    assert cosines(output.vectors, right).min() >= EXACT
    assert output.tokens == 2 * 2048 + len(token_ids(gemma, "short"))
    assert output.truncated == (0, 1)
    counts = await engine.count_tokens(texts)
    exact = [len(token_ids(gemma, text)) for text in texts]
    assert counts[1:] == exact[1:]
    assert counts[0] == pytest.approx(exact[0], rel=0.1)  # an estimate, so far over the limit


async def test_truncating_a_huge_text_does_not_delay_queries(
    engine: VLLMEngine, gemma: Path, pool: Texts
) -> None:
    assert len(MEGABYTE) > 1_000_000
    service = EmbeddingService(engine)

    async def query(number: int) -> float:
        await asyncio.sleep(number * 0.05)
        started = time.monotonic()
        texts, right = pool.take([number])
        output = await embed(engine, texts, "query")
        assert cosines(output.vectors, right).min() >= EXACT
        return time.monotonic() - started

    huge, *waits = await asyncio.gather(
        service.embed(request([MEGABYTE] * 4, truncate="end")), *map(query, range(20))
    )
    assert huge.usage.tokens == 4 * 2048
    right = reference_vectors(gemma, [MEGABYTE[:MAX_CHARACTERS]], max_tokens=2048)
    assert cosines(np.asarray(huge.vectors), right.repeat(4, axis=0)).min() >= EXACT
    started = time.monotonic()
    engine._tokenizer._backend.encode_batch_fast([MEGABYTE] * 4)
    uncut = time.monotonic() - started
    assert np.median(waits) < uncut / 2
    assert max(waits) < uncut
    # Without the service's own truncation.
    output = await embed(engine, [MEGABYTE], truncate="end")
    assert cosines(output.vectors, right).min() >= EXACT


# --- many


async def test_a_request_with_the_most_texts_has_the_reference_vectors(
    engine: VLLMEngine, pool: Texts
) -> None:
    short = [row for row, tokens in enumerate(pool.tokens) if tokens <= 40]
    rows = np.random.default_rng(1).choice(short, MAX_TEXTS).tolist()
    texts, right = pool.take(rows)
    assert len(set(texts)) < len(texts) == 2048
    answer = await EmbeddingService(engine).embed(request(texts))
    assert cosines(np.asarray(answer.vectors), right).min() >= EXACT
    assert answer.usage.tokens == sum(pool.tokens[row] for row in rows)


async def test_equal_texts_have_equal_vectors(engine: VLLMEngine) -> None:
    output = await embed(engine, ["the same text", "another one"] * 100)
    assert np.abs(output.vectors[::2] - output.vectors[0]).max() < 1e-5
    assert np.abs(output.vectors[1::2] - output.vectors[1]).max() < 1e-5
    assert output.vectors[0] @ output.vectors[1] < 0.9


# --- invalid texts


async def test_invalid_texts_are_named_and_other_calls_succeed(
    engine: VLLMEngine, pool: Texts
) -> None:
    service = EmbeddingService(engine)
    bad = ["good", "lone \ud800 surrogate", "", "good too", " \n", None]
    refused, answer = await asyncio.gather(
        service.embed(request(bad)), service.embed(request(pool.texts)), return_exceptions=True
    )
    assert isinstance(refused, InvalidInputError)
    assert [each.index for each in refused.invalid] == [1, 2, 4, 5]
    assert not isinstance(answer, BaseException)
    assert cosines(np.asarray(answer.vectors), pool.vectors).min() >= EXACT
