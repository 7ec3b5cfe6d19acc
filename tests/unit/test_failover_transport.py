"""Several servers: who gets a request, what a failure costs, and when a query is sent twice."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scripted import ScriptedTransport, vectors_of

from kalm_integrations import KalmClient
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import (
    AuthenticationError,
    CanaryFailedError,
    ConfigurationError,
    ConnectionFailedError,
    InvalidInputError,
    KalmError,
    RateLimitError,
)
from kalm_integrations.protocol import EmbedRequest, EmbedResponse
from kalm_integrations.transports import failover
from kalm_integrations.transports.failover import FailoverTransport

DOWN = ConnectionFailedError("connection refused")
QUERY = EmbedRequest(texts=["a"], role="query")


class Clock:
    """`time.monotonic`, which only a test moves."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(failover, "time", clock)
    return clock


class Server:
    """Answers, fails with `error`, or waits for `gate`."""

    can_be_cold = True

    def __init__(self, error: KalmError | None = None) -> None:
        self.error, self.gate = error, asyncio.Event()
        self.gate.set()
        self.received = self.cancelled = 0

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        self.received += 1
        try:
            await self.gate.wait()
            for _ in range(5):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return await ScriptedTransport().embed(request)

    async def ensure_ready(self) -> None:
        if self.error is not None:
            raise self.error

    async def close(self) -> None: ...


def over(*servers: Server, hedge: bool = False) -> FailoverTransport:
    return FailoverTransport({f"server {n}": each for n, each in enumerate(servers)}, hedge=hedge)


async def test_requests_go_to_the_least_busy() -> None:
    first, second, third = servers = [Server() for _ in range(3)]
    transport = over(*servers)
    first.gate.clear()
    running = [asyncio.ensure_future(transport.embed(QUERY)) for _ in range(3)]
    await asyncio.gather(*running[1:])
    for _ in range(4):
        await transport.embed(QUERY)
    assert first.received == 1
    assert {second.received, third.received} == {3}
    first.gate.set()
    await asyncio.gather(*running)


async def test_a_failed_request_goes_to_another_server_at_once() -> None:
    down, up = Server(DOWN), Server()
    transport = over(down, up)
    for _ in range(5):
        answer = await transport.embed(QUERY)
        assert np.array_equal(answer.vectors.astype("f4"), vectors_of(["a"]))
    assert (down.received, up.received) == (1, 5)
    assert await transport.ensure_ready() is None


async def test_a_failed_server_is_left_alone_for_longer_each_time(clock: Clock) -> None:
    down, up = Server(DOWN), Server()
    transport = over(down, up)
    tries = []
    for _ in range(4000):
        before = down.received
        await transport.embed(QUERY)
        if down.received > before:
            tries.append(clock.now)
        clock.now += 0.1
    pauses = np.diff(tries)
    assert pauses[:5] == pytest.approx([1, 2, 4, 8, 16], abs=0.2)
    assert max(pauses) == pytest.approx(failover.LONGEST_PAUSE, abs=0.3)
    down.error = None
    clock.now += failover.LONGEST_PAUSE + 1
    before = down.received
    for _ in range(4):
        await transport.embed(QUERY)
        clock.now += 0.1
    assert down.received == before + 2


async def test_requests_that_fail_together_are_one_failure(clock: Clock) -> None:
    down, up = Server(DOWN), Server()
    down.gate.clear()
    transport = over(down, up)
    running = [asyncio.ensure_future(transport.embed(QUERY)) for _ in range(16)]
    await asyncio.sleep(0)
    assert down.received == 8
    down.gate.set()
    await asyncio.gather(*running)
    clock.now += 1.1
    down.error = None
    await transport.embed(QUERY)
    assert down.received == 9


async def test_a_server_that_may_be_back_is_tried_by_one_request(clock: Clock) -> None:
    down, up = Server(DOWN), Server()
    transport = over(down, up)
    await transport.embed(QUERY)
    clock.now += 2
    down.gate.clear()
    running = [asyncio.ensure_future(transport.embed(QUERY)) for _ in range(5)]
    await asyncio.sleep(0)
    assert down.received == 2
    down.gate.set()
    await asyncio.gather(*running)


async def test_a_server_that_hangs_costs_half_of_the_time_once() -> None:
    hung, up = Server(), Server()
    hung.gate.clear()
    transport = over(hung, up)
    for _ in range(6):
        async with asyncio.timeout(0.4):
            await transport.embed(replace(QUERY, timeout=0.4))
    assert (hung.received, up.received) == (1, 6)
    assert hung.cancelled


async def test_a_cancelled_request_says_nothing_of_its_server() -> None:
    slow, up = Server(), Server()
    slow.gate.clear()
    transport = over(slow, up)
    running = asyncio.ensure_future(transport.embed(replace(QUERY, timeout=10.0)))
    await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert transport._servers[0].is_available


async def test_retry_after_is_respected(clock: Clock) -> None:
    busy, up = Server(RateLimitError("busy", retry_after=30.0)), Server()
    transport = over(busy, up)
    await transport.embed(QUERY)
    clock.now += 29
    await transport.embed(QUERY)
    assert busy.received == 1
    clock.now += 2
    await transport.embed(QUERY)
    assert busy.received == 2


@pytest.mark.parametrize("error", [AuthenticationError("key"), InvalidInputError("text")])
async def test_what_would_fail_elsewhere_too_is_not_sent_again(error: KalmError) -> None:
    servers = [Server(error), Server()]
    with pytest.raises(type(error)):
        await over(*servers).embed(QUERY)
    assert [server.received for server in servers] == [1, 0]


async def test_a_server_with_wrong_vectors_is_replaced_by_the_others() -> None:
    assert (await over(Server(CanaryFailedError("wrong")), Server()).embed(QUERY)).usage


async def test_where_all_fail_each_is_tried_once_and_the_error_is_raised() -> None:
    servers = [Server(DOWN) for _ in range(3)]
    transport = over(*servers)
    with pytest.raises(ConnectionFailedError):
        await transport.embed(QUERY)
    assert [server.received for server in servers] == [1, 1, 1]
    with pytest.raises(ConnectionFailedError):
        await transport.embed(QUERY)  # the session decides how often to come back
    assert sum(server.received for server in servers) == 4


async def measured(transport: FailoverTransport) -> None:
    for _ in range(100):
        await transport.embed(QUERY)


async def test_a_slow_query_is_sent_to_a_second_server_and_the_first_answer_counts() -> None:
    servers = Server(), Server()
    transport = over(*servers, hedge=True)
    await measured(transport)
    transport._hedges_left = 5.0  # on a busy machine some of the measured queries were slow
    servers[0].gate.clear()
    for _ in range(4):
        await asyncio.wait_for(transport.embed(QUERY), 10)
    assert servers[0].cancelled
    assert all(server.in_flight == 0 for server in transport._servers)


async def test_no_more_than_five_in_a_hundred_queries_are_sent_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    servers = Server(), Server()
    transport = over(*servers, hedge=True)
    for _ in range(100):
        await transport.embed(QUERY)
    monkeypatch.setattr(transport, "_slow", lambda: 0.0)  # any answer is slow now
    before = sum(server.received for server in servers)
    for _ in range(300):
        await transport.embed(QUERY)
    assert 300 < sum(server.received for server in servers) - before <= 300 + 5 + 15


@pytest.mark.parametrize(("role", "hedge"), [("document", True), ("query", False)])
async def test_documents_are_never_sent_twice_nor_anything_by_default(
    role: Any, hedge: bool
) -> None:
    servers = Server(), Server()
    transport = over(*servers, hedge=hedge)
    transport._hedges_left = 5.0
    transport._seconds.extend([0.0] * 200)
    for _ in range(20):
        await transport.embed(EmbedRequest(texts=["a"], role=role))
    assert sum(server.received for server in servers) == 20


def test_several_urls_in_a_list_or_with_commas() -> None:
    urls = ["http://one:8000", "http://two:8000/v1"]
    for value in (urls, tuple(urls), " http://one:8000 , http://two:8000/v1 "):
        assert ClientConfig(base_url=value).base_urls == urls
    assert ClientConfig(base_url=[*urls, urls[0]]).base_urls == urls
    assert KalmClient(base_url=urls) == KalmClient(base_url=",".join(urls))


def test_the_variable_takes_several_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALM_BASE_URL", "http://one,http://two")
    assert ClientConfig().base_urls == ["http://one", "http://two"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"base_url": "http://one,two"},
        {"base_url": ["http://one", "ftp://two"]},
        {"base_url": "http://one,"},
        {"base_url": []},
        {"base_url": "http://one", "hedge": True},
    ],
)
def test_what_is_no_list_of_urls_is_refused(arguments: Any) -> None:
    with pytest.raises(ConfigurationError, match="base_url"):
        ClientConfig(**arguments)
