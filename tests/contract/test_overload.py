"""Overload over HTTP, in front of an engine of a fixed speed: what is refused and computed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import pytest
from scripted_engine import ScriptedEngine
from serving import serving

from kalm_integrations.errors import ContainerFailedError, ServiceUnavailableError
from kalm_integrations.protocol import TIMEOUT_HEADER, EmbedRequest
from modal_backend.engines.base import PRIORITY, EngineOutput, Progress, no_progress
from modal_backend.engines.embedded import EmbeddedEngine
from modal_backend.engines.embedded_process import ProcessEngine
from modal_backend.engines.priority_lock import PriorityLock
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.service import EmbeddingService

SECONDS = 0.02


class SteadyEngine(ScriptedEngine):
    """Takes `SECONDS` for each call, one at a time; queries go first."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0
        self._lock = PriorityLock()

    async def embed(
        self, texts: Sequence[str], *, role: Any, progress: Progress = no_progress, **options: Any
    ) -> EngineOutput:
        async with self._lock.hold(self._lock.ticket(PRIORITY[role])):
            progress(0)
            self.computed += 1
            await asyncio.sleep(SECONDS)
        progress(len(texts))
        return EngineOutput(self.right(texts), len(texts))


def test_requests_that_cannot_finish_in_time_are_refused_and_never_computed() -> None:
    engine = SteadyEngine()
    service = EmbeddingService(engine)

    async def main(url: str) -> list[tuple[int, Any, Any]]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def post(timeout: float) -> tuple[int, Any, Any]:
                headers = {TIMEOUT_HEADER: str(timeout)}
                content = {"input": "a short query"}
                async with session.post(
                    f"{url}/v1/embeddings", json=content, headers=headers
                ) as answer:
                    return answer.status, await answer.json(), answer.headers

            for _ in range(20):  # the speed is learnt
                assert (await post(60))[0] == 200
            engine.computed = 0
            answers = await asyncio.gather(*(post(60) for _ in range(400)))
            assert (await post(60))[0] == 200  # recovered
            return answers

    with serving(create_app(service, keys=BearerKeys(None))) as url:
        answers = asyncio.run(main(url))
    good = [status for status, *_ in answers if status == 200]
    refused = [(body, headers) for status, body, headers in answers if status == 503]
    assert len(good) + len(refused) == 400
    # 2.1 to 3 s of work are admitted; on a slow machine, whose 20 ms are longer, less.
    assert 10 <= len(good) <= 200
    assert engine.computed == len(good) + 1
    for body, headers in refused:
        assert body["error"]["code"] == "service_unavailable"
        milliseconds = int(headers["Retry-After-Ms"])
        assert 0 < milliseconds <= 4_000
        assert int(headers["Retry-After"]) == -(-milliseconds // 1000)
    assert service.admission.texts_in_progress == {"query": 0, "document": 0}


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ({"input": ["a", 1]}, {}, 400),
        ({"input": 1}, {}, 400),
        ({"input": "a", "unknown": 1}, {}, 400),
        ({"input": "a"}, {TIMEOUT_HEADER: "soon"}, 400),
        ({"input": "a", "model": "another"}, {}, 404),
        ({"input": "a \ud800"}, {}, 503),
        ({"input": "a"}, {TIMEOUT_HEADER: "1"}, 503),
        ({"input": ["a", "b"]}, {}, 200),
    ],
)
async def test_invalid_requests_get_their_own_error_during_overload(
    body: Any, headers: Any, status: int
) -> None:
    """A mistake in a field is named as it is without overload."""
    service = EmbeddingService(SteadyEngine())
    service.admission.speed.tokens_per_second = 10.0
    # Ten seconds of queries.
    with service.admission.admit("query", ["a" * 300], time.monotonic() + 600):
        with pytest.raises(ServiceUnavailableError):
            await service.embed(EmbedRequest(texts=["q"], role="query", timeout=5))
        assert service.admission.refusing
        with serving(create_app(service, keys=BearerKeys(None))) as url:
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{url}/v1/embeddings", json=body, headers=headers) as answer,
            ):
                assert answer.status == status, await answer.text()


async def test_a_server_that_is_behind_refuses_requests_unread() -> None:
    """From when it is behind during an overload until queries are admitted again."""
    behind = True
    service = EmbeddingService(SteadyEngine())
    service.admission.speed.tokens_per_second = 10.0
    app = create_app(service, keys=BearerKeys(None), behind=lambda: behind)
    with serving(app) as url:
        async with aiohttp.ClientSession(url) as session:

            async def post() -> tuple[int, Any]:
                async with session.post("/v1/embeddings", data=b"not JSON") as answer:
                    return answer.status, answer.headers.get("Retry-After-Ms")

            assert (await post())[0] == 400  # not overloaded
            with service.admission.admit("query", ["a" * 300]):  # ten seconds
                with pytest.raises(ServiceUnavailableError):
                    await service.embed(EmbedRequest(texts=["q"], role="query", timeout=5))
                wait = service.admission.reopens_in("query")
                status, milliseconds = await post()
                assert status == 503
                assert 1000 * wait <= int(milliseconds) <= 1200 * wait + 100
                behind = False
                assert (await post())[0] == 503
                async with session.get("/health") as health:
                    assert health.status == 200
            assert (await post())[0] == 400


async def embed(engine: EmbeddedEngine, texts: list[str]) -> EngineOutput:
    return await engine.embed(texts, role="document", truncate="error", deadline=None)


async def test_the_engine_process_computes_the_same_vectors() -> None:
    texts = ["How high is K2?", "Warum geht Brot auf?", "word " * 3_000]
    here, there = EmbeddedEngine.load(), await ProcessEngine.start()
    try:
        assert there.identity == here.identity
        first, second = await embed(here, texts), await embed(there, texts)
        assert (first.vectors == second.vectors).all()
        assert first.tokens == second.tokens
    finally:
        await here.close()
        await there.close()


async def test_closing_ends_the_engine_process_during_a_computation() -> None:
    engine = await ProcessEngine.start()
    started = time.monotonic()
    running = asyncio.create_task(embed(engine, ["word " * 8_000] * 200))
    await asyncio.sleep(0.1)
    await engine.close()
    await engine.close()
    with pytest.raises(ServiceUnavailableError):
        await running
    assert not engine._process.is_alive()
    assert time.monotonic() - started < 60  # computing them takes minutes


async def test_a_dead_engine_process_is_reported() -> None:
    engine = await ProcessEngine.start()
    died = asyncio.create_task(engine.died())
    running = asyncio.create_task(embed(engine, ["word " * 8_000] * 200))
    await asyncio.sleep(0.1)
    assert engine._process.pid is not None
    os.kill(engine._process.pid, signal.SIGKILL)
    with pytest.raises(ContainerFailedError):
        await running
    assert isinstance(await asyncio.wait_for(died, 30), ContainerFailedError)
    await engine.close()
