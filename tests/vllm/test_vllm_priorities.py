"""Queries go first, and cancelled or late work is dropped. One engine, whose steps have 256 tokens:
one or two of the documents here."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import texts as some
from running import embed

from kalm_integrations.errors import (
    DeadlineExceededError,
    ServiceUnavailableError,
    TransportError,
)
from kalm_integrations.prompts import Role
from kalm_integrations.protocol import EmbedRequest
from modal_backend.admission import Admission
from modal_backend.engines.vllm import engine as vllm_engine
from modal_backend.engines.vllm.engine import VLLMEngine
from modal_backend.service import EmbeddingService

pytestmark = pytest.mark.asyncio(loop_scope="session")

Calls = list[asyncio.Task[Any]]

QUERIES = [f"query {number}" for number in range(20)]
RUNNING = 6
"""Most documents that have tokens in the step that queries wait for and in the one that computes
them: each finishes one or two, or parts of them."""


@pytest.fixture(scope="module")
def documents(gemma: Path) -> list[str]:
    """500 of 200 tokens."""
    texts = [some.text_of_tokens(gemma, 200, seed=seed) for seed in range(20)]
    return [f"{number % 10}{text}" for number, text in enumerate(texts * 25)]


async def until(condition: Any, seconds: float = 120.0) -> None:
    """Wait for it to be true."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def unfinished(engine: VLLMEngine) -> int:
    """Requests that vLLM has."""
    return int(engine._llm.get_num_unfinished_requests())


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def hundred(engine: VLLMEngine, documents: list[str]) -> float:
    """Seconds that 100 documents take here and now, a query 80 times less."""
    start = time.monotonic()
    await embed(engine, documents[:100])
    return time.monotonic() - start


async def is_free(engine: VLLMEngine, hundred: float) -> bool:
    """Nothing is left of earlier calls, here or in the core: a document does not wait for the
    hundreds that were there before it."""
    await until(lambda: unfinished(engine) == 0)
    start = time.monotonic()
    await embed(engine, ["a document"])
    took = time.monotonic() - start
    processor = engine._llm.output_processor
    left = (processor.request_states, processor.external_req_ids, engine._calls)
    return took < hundred and not any(left)


@asynccontextmanager
async def queued(engine: VLLMEngine, documents: list[str], hundred: float) -> AsyncIterator[Calls]:
    """Calls of a document each; the engine has begun with the first, and dropped the last after
    the block."""
    calls = [asyncio.create_task(embed(engine, [text])) for text in documents]
    try:
        await until(lambda: done(calls) and unfinished(engine) == len(calls) - done(calls))
        yield calls
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert await is_free(engine, hundred)


def done(calls: Calls) -> int:
    return sum(call.done() for call in calls)


@asynccontextmanager
async def standing_still(engine: VLLMEngine) -> AsyncIterator[None]:
    """The core computes nothing meanwhile: what arrives queues up, however busy this machine is."""
    await engine._llm.pause_generation(mode="keep", clear_cache=False)
    try:
        yield
    finally:
        await engine._llm.resume_generation()


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """ "document" or "query", each when its vector is there."""
    from vllm.v1.engine.output_processor import RequestOutputCollector

    order: list[str] = []
    put = RequestOutputCollector.put

    def noting(self: Any, output: Any) -> None:
        put(self, output)
        order.append("document" if len(output.prompt_token_ids) > 100 else "query")

    monkeypatch.setattr(RequestOutputCollector, "put", noting)
    return order


async def overtaking(engine: VLLMEngine, order: list[str]) -> int:
    """How many documents are done between the arrival of 20 queries and their last answer. The
    documents are there already, and some of them are done."""
    async with standing_still(engine):
        before, there = len(order), unfinished(engine)
        queries = [asyncio.create_task(embed(engine, [text], "query")) for text in QUERIES]
        await until(lambda: unfinished(engine) == there + len(QUERIES))
    await asyncio.gather(*queries)
    last = max(place for place, kind in enumerate(order) if kind == "query")
    assert 0 < before < last
    return order[before:last].count("document")


# --- priorities


async def test_queries_wait_only_for_the_running_steps(
    engine: VLLMEngine, documents: list[str], hundred: float, order: list[str]
) -> None:
    assert len(documents) == 500
    async with queued(engine, documents, hundred):
        assert await overtaking(engine, order) <= RUNNING


async def test_queries_without_priority_wait_for_the_documents(
    engine: VLLMEngine,
    hundred: float,
    documents: list[str],
    order: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(vllm_engine.PRIORITY, "query", vllm_engine.PRIORITY["document"])
    async with queued(engine, documents[:100], hundred):
        assert await overtaking(engine, order) > 2 * RUNNING


async def test_a_query_overtakes_a_partly_computed_document(
    engine: VLLMEngine, gemma: Path, hundred: float, order: list[str]
) -> None:
    """Eight steps each; of the one that was begun, only a part is computed before the query."""
    long = [some.text_of_tokens(gemma, 2000, seed=seed) for seed in range(5)]
    overtaken = []
    for _ in range(5):
        async with queued(engine, ["the first, which is done", *long], hundred):
            async with standing_still(engine):
                before, there = len(order), unfinished(engine)
                query = asyncio.create_task(embed(engine, ["a query"], "query"))
                await until(lambda there=there: unfinished(engine) == there + 1)
            await query
            overtaken.append(order[before:].index("query"))
    assert overtaken.count(0) >= 3, overtaken  # now and then one was all but done


async def test_queries_overtake_one_call_of_500_documents(
    engine: VLLMEngine, documents: list[str], hundred: float, order: list[str]
) -> None:
    bulk = asyncio.create_task(embed(engine, documents))
    await until(lambda: order and unfinished(engine) == len(documents) - len(order))
    assert await overtaking(engine, order) <= RUNNING
    bulk.cancel()
    await asyncio.gather(bulk, return_exceptions=True)
    assert await is_free(engine, hundred)


async def test_a_query_is_tokenized_before_waiting_documents(
    engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized: list[str] = []
    resume = threading.Event()
    encode = engine._tokenizer.encode

    def slowly(texts: list[str], *args: Any) -> Any:
        tokenized.append(texts[0])
        resume.wait(10)
        return encode(texts, *args)

    monkeypatch.setattr(engine._tokenizer, "encode", slowly)
    bulk = [asyncio.create_task(embed(engine, [name] * 200)) for name in ("first", "second")]
    await until(lambda: tokenized)
    query = asyncio.create_task(embed(engine, ["query"], "query"))
    for _ in range(5):
        await asyncio.sleep(0)
    resume.set()
    await asyncio.gather(query, *bulk)
    assert tokenized == ["first", "query", *["first"] * 3, *["second"] * 4]


# --- cancellation and deadlines


async def test_cancelled_calls_leave_the_engine(
    engine: VLLMEngine, documents: list[str], hundred: float
) -> None:
    calls = [asyncio.create_task(embed(engine, documents[:100])) for _ in range(3)]
    await until(lambda: unfinished(engine) > 250)
    for call in calls:
        call.cancel()
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in ended] == [asyncio.CancelledError] * 3
    assert await is_free(engine, hundred)


async def test_calls_cancelled_at_any_moment_leave_the_engine(
    engine: VLLMEngine, documents: list[str], hundred: float
) -> None:
    """Cancelled before their first step, while they are tokenized, queued, and computed."""
    right = (await embed(engine, documents[:1])).vectors
    tasks = asyncio.all_tasks()
    for number in range(200):
        role: Role = "query" if number % 2 else "document"
        call = asyncio.create_task(embed(engine, documents[: 1 + number % 7], role))
        await asyncio.sleep(0 if number % 3 else 0.001 * (number % 20))
        call.cancel()
        ended = await asyncio.gather(call, return_exceptions=True)
        assert not isinstance(ended[0], Exception)
    assert await is_free(engine, hundred)
    assert asyncio.all_tasks() <= tasks
    assert np.array_equal((await embed(engine, documents[:1])).vectors, right)


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 0.01, 0.2])
async def test_a_passed_deadline_frees_the_engine(
    engine: VLLMEngine, documents: list[str], hundred: float, seconds: float
) -> None:
    start = time.monotonic()
    with pytest.raises(DeadlineExceededError) as error:
        await engine.embed(documents, role="document", truncate="error", deadline=start + seconds)
    assert time.monotonic() - start < max(seconds, 0) + 2 * hundred  # all take 5 times as long
    assert error.value.__cause__ is None
    assert await is_free(engine, hundred)


async def test_a_deadline_does_not_affect_other_calls(
    engine: VLLMEngine, documents: list[str], hundred: float
) -> None:
    neighbour = asyncio.create_task(embed(engine, documents[:30]))
    with pytest.raises(DeadlineExceededError):
        await engine.embed(
            documents, role="document", truncate="error", deadline=time.monotonic() + 0.05
        )
    assert len((await neighbour).vectors) == 30
    assert await is_free(engine, hundred)


async def test_an_error_of_vllm_fails_only_its_own_call(
    engine: VLLMEngine, documents: list[str], hundred: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other texts leave the engine."""
    encode = engine._tokenizer.encode

    def wrongly(texts: list[str], *args: Any) -> Any:
        ids, *others = encode(texts, *args)
        ids[:] = [[10**6] if text == "wrong" else ids[row] for row, text in enumerate(texts)]
        return ids, *others

    right = (await embed(engine, documents[:30])).vectors
    monkeypatch.setattr(engine._tokenizer, "encode", wrongly)
    refused, *others = await asyncio.gather(
        embed(engine, [*documents[:100], "wrong"]),
        *(embed(engine, documents[:30]) for _ in range(3)),
        return_exceptions=True,
    )
    assert isinstance(refused, TransportError)
    assert "out of vocabulary" in str(refused)
    assert refused.__cause__ is refused.__context__ is None
    for output in others:
        assert not isinstance(output, BaseException)
        assert np.abs(output.vectors - right).max() < 1e-5
    assert await is_free(engine, hundred)


# --- overload


async def test_documents_over_capacity_are_refused_with_a_retry_time(
    engine: VLLMEngine, documents: list[str]
) -> None:
    """Queries have their own capacity."""
    service = EmbeddingService(engine, Admission({"query": 20, "document": 100}))

    def ask(texts: list[str], role: Role) -> asyncio.Task[Any]:
        return asyncio.create_task(service.embed(EmbedRequest(texts=texts, role=role)))

    taken = [ask(documents[number::20], "document") for number in range(4)]  # 25 texts each
    await until(lambda: unfinished(engine) > 0)
    refused = await asyncio.gather(
        *(ask(documents[:1], "document") for _ in range(50)), return_exceptions=True
    )
    assert {type(error) for error in refused} == {ServiceUnavailableError}
    assert all(error.retry_after > 0 for error in refused)
    queries = await asyncio.gather(*(ask([text], "query") for text in QUERIES))
    assert len(queries) == 20
    assert not all(call.done() for call in taken)
    assert [len((await call).vectors) for call in taken] == [25] * 4
    await ask(documents[:1], "document")
    assert service.admission.texts_in_progress == {"query": 0, "document": 0}
