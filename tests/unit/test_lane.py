"""The lane: a lone blocking call runs on its caller's thread; if it cannot, on the I/O thread."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scripted import ScriptedTransport, vector_of

from kalm_integrations import KalmClient, KalmError
from kalm_integrations.errors import IdentityMismatchError, TransportError
from kalm_integrations.models import EMBEDDED
from kalm_integrations.protocol import EmbedRequest, EmbedResponse

IO = "kalm-io"


class Watched(ScriptedTransport):
    """Notes the thread that each request runs on; texts "slow ..." wait until they are let go."""

    may_rest = True

    def __init__(self, *faults: Any) -> None:
        super().__init__(faults)
        self.threads: list[str] = []
        self.slow = threading.Event()

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        self.threads.append(threading.current_thread().name)
        while request.texts[0].startswith("slow") and not (self.slow.is_set() or self.closed):
            await asyncio.sleep(0.005)
        if self.closed:
            raise KalmError("the client was closed during the call.")
        return await super().embed(request)


@pytest.fixture
def transport() -> Watched:
    return Watched()


@pytest.fixture
def client(transport: Watched, over: Callable[..., KalmClient]) -> Iterator[KalmClient]:
    """One that has embedded a text before."""
    client = over(transport)
    ask(client, "first")
    assert transport.threads == [IO]
    transport.threads.clear()
    yield client
    client.close()


def ask(client: KalmClient, text: str) -> None:
    (vector,) = client.embed([text], role="query").vectors
    assert np.array_equal(vector, vector_of(text).astype(np.float32))


def in_flight(transport: Watched, requests: int) -> None:
    until = time.monotonic() + 10
    while len(transport.threads) < requests and time.monotonic() < until:
        time.sleep(0.002)
    assert len(transport.threads) == requests


def test_a_lone_text_runs_on_its_callers_thread(client: KalmClient, transport: Watched) -> None:
    ask(client, "a")
    with ThreadPoolExecutor(1, thread_name_prefix="worker") as pool:
        pool.submit(ask, client, "b").result()
    assert transport.threads == ["MainThread", "worker_0"]


def test_several_texts_and_those_of_a_loop_do_not(client: KalmClient, transport: Watched) -> None:
    async def blocking() -> None:
        ask(client, "in a coroutine")

    client.embed(["a", "b"])
    asyncio.run(client.aembed(["a"]))
    asyncio.run(blocking())
    assert transport.threads == [IO] * 3


def test_whoever_comes_while_it_is_taken_waits_for_nobody(
    client: KalmClient, transport: Watched
) -> None:
    with ThreadPoolExecutor(1, thread_name_prefix="worker") as pool:
        slow = pool.submit(ask, client, "slow")
        in_flight(transport, 1)
        ask(client, "quick")
        assert not slow.done()
        transport.slow.set()
        slow.result()
    assert transport.threads == ["worker_0", IO]


def test_many_threads_get_their_own_vectors(client: KalmClient, transport: Watched) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, [client] * 400, [f"text {number}" for number in range(400)]))
    assert len(transport.threads) == 400


def test_a_failure_leaves_it_as_it_was(transport: Watched, over: Callable[..., KalmClient]) -> None:
    client = over(Watched(None, TransportError("broken"), None), max_retries=0)
    ask(client, "first")
    with pytest.raises(TransportError, match="broken"):
        ask(client, "second")
    lane = client._sessions._lane
    ask(client, "third")
    assert client._sessions._lane is lane
    client.close()


def test_both_ways_hold_answers_against_one_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that nobody declared, the first answer says what all others must be."""
    first = replace(EMBEDDED.space, model="one/of-mine")
    second = replace(first, revision="another")
    transports = iter(
        [
            Watched(lambda answer: replace(answer, identity=first)),
            Watched(lambda answer: replace(answer, identity=second)),
        ]
    )
    monkeypatch.setattr("kalm_integrations.session.open_transport", lambda _: next(transports))
    with KalmClient(base_url="http://here", model=first.model) as client:
        ask(client, "by the I/O thread")
        with pytest.raises(IdentityMismatchError, match="revision"):
            ask(client, "by the lane")


class StruckError(Exception):
    """What a signal's handler raises."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no setitimer")
def test_what_a_signals_handler_raises_ends_the_call_and_the_lane_only(
    client: KalmClient, transport: Watched
) -> None:
    def strike(*_: object) -> None:
        raise StruckError

    ask(client, "opens it")
    struck = client._sessions._lane
    before = signal.signal(signal.SIGALRM, strike)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(StruckError):
            ask(client, "slow")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    until = time.monotonic() + 10
    while transport.closed < 1 and time.monotonic() < until:
        time.sleep(0.002)
    transport.closed = 0  # one transport for all sessions, here
    ask(client, "again")
    assert transport.threads == ["MainThread"] * 3
    assert struck is not client._sessions._lane


def test_closing_ends_a_call_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    transports = [Watched(), Watched()]
    opened = iter(transports)
    monkeypatch.setattr("kalm_integrations.session.open_transport", lambda _: next(opened))
    client = KalmClient(backend="local")
    ask(client, "by the I/O thread")
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, client, "slow")
        in_flight(transports[1], 1)
        let_go = threading.Timer(20, transports[1].slow.set)  # or a failure would never end
        let_go.start()
        client.close()
        let_go.cancel()
        with pytest.raises(KalmError, match="closed during the call"):
            slow.result(10)


def test_closing_closes_it_and_a_later_call_opens_another(
    client: KalmClient, transport: Watched
) -> None:
    ask(client, "opens it")
    asyncio.run(client.aclose())
    assert transport.closed == 2  # the session's, and the lane's
    transport.closed = 0
    ask(client, "by the I/O thread")
    ask(client, "by the lane")
    assert transport.threads == ["MainThread", IO, "MainThread"]


def test_copies_have_none_of_it(client: KalmClient) -> None:
    ask(client, "opens it")
    assert client._sessions._lane is not None
    assert client.model_copy()._sessions._lane is None
    assert client.model_copy() == client


def test_without_a_file_left_it_is_the_io_thread(
    client: KalmClient, transport: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("kalm_integrations.lane.ClientLoop", fail)
    ask(client, "a")
    assert transport.threads == [IO]


def test_a_transport_whose_loop_must_not_rest_has_none(over: Callable[..., KalmClient]) -> None:
    client = over(ScriptedTransport())
    for text in ("a", "b", "c"):
        ask(client, text)
    assert client._sessions._lane is None
    client.close()
