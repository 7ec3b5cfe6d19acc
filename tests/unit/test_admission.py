"""Admission control in virtual time, in front of simulated engines."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import virtual_time

from kalm_integrations.errors import DeadlineExceededError, ServiceUnavailableError
from kalm_integrations.prompts import Role
from modal_backend.admission import (
    DEADLINE_SHARE,
    MAX_WAIT,
    REQUEST_TOKENS,
    Admission,
    EngineSpeed,
    work_of,
)
from modal_backend.engines.base import PRIORITY, Progress
from modal_backend.engines.priority_lock import PriorityLock, chunks

QUERY = ["how high is the mountain"]
DOCUMENTS = ["a passage of some sixty tokens " * 8] * 16
TEXTS: dict[Role, list[str]] = {"query": QUERY, "document": DOCUMENTS}
SPEED = 4_000.0
CHUNK = {"max_texts": 16, "max_tokens": 4096}


def work(texts: Sequence[str]) -> float:
    return REQUEST_TOKENS + sum(map(work_of, texts))


def now() -> float:
    return asyncio.get_running_loop().time()


def deadline_after(timeout: float | None) -> float | None:
    return None if timeout is None else now() + timeout


class SerialEngine:
    """Computes one chunk after the other, as the embedded engine does."""

    def __init__(self, speed: float = SPEED, jitter: float = 0.2) -> None:
        self.speed = speed
        self.computed = 0.0
        """Work that was computed, in tokens, wanted or not."""
        self._random = random.Random(1)
        self._jitter = jitter
        self._lock = PriorityLock()

    async def embed(self, texts: Sequence[str], role: Role, progress: Progress) -> None:
        ticket = self._lock.ticket(PRIORITY[role])
        for start, chunk in chunks(texts, **CHUNK):
            async with self._lock.hold(ticket):
                progress(start)
                amount = sum(map(work_of, chunk)) + (REQUEST_TOKENS if not start else 0)
                self.computed += amount
                factor = self._random.uniform(1 - self._jitter, 1 + self._jitter)
                await asyncio.sleep(factor * amount / self.speed)
        progress(len(texts))


class BatchingEngine:
    """Computes up to `batch` texts together in steps of 20 ms, as vLLM does."""

    def __init__(self, batch: int = 64) -> None:
        self._slots = asyncio.Semaphore(batch)
        self.computed = 0.0

    async def embed(self, texts: Sequence[str], role: Role, progress: Progress) -> None:
        progress(0)
        for number, text in enumerate(texts, 1):
            async with self._slots:
                await asyncio.sleep(0.02)
            self.computed += work_of(text)
            progress(number)


@dataclass
class Service:
    """Admission before an engine, and what became of each request."""

    engine: Any = field(default_factory=SerialEngine)
    admission: Admission = field(default_factory=lambda: Admission(clock=now))
    done: list[tuple[Role, float, float]] = field(default_factory=list)
    """Role, time of the answer, latency."""
    refused: list[tuple[Role, float, float]] = field(default_factory=list)
    """Role, time, Retry-After."""
    dropped: int = 0

    async def embed(self, role: Role, timeout: float | None, texts: Any = None) -> str:
        """How the request ended."""
        texts = texts or TEXTS[role]
        start = now()
        try:
            with self.admission.admit(role, texts, deadline_after(timeout)) as request:
                async with asyncio.timeout(timeout):
                    await self.engine.embed(texts, role, request.progress)
        except ServiceUnavailableError as error:
            self.refused.append((role, start, error.retry_after or math.nan))
            return "refused"
        except (TimeoutError, DeadlineExceededError):
            self.dropped += 1
            return "dropped"
        self.done.append((role, now(), now() - start))
        return "done"

    def goodput(self, start: float, end: float) -> float:
        """Tokens a second of the answers in that time."""
        return sum(work(TEXTS[r]) for r, when, _ in self.done if start < when <= end) / (
            end - start
        )


async def overload(
    service: Service, times: float, timeout: float, seconds: float, documents: float = 0.0
) -> list[asyncio.Task[str]]:
    """Send `times` the capacity at random times. `documents` is their share of the requests."""
    dice = random.Random(7)
    mean = documents * work(DOCUMENTS) + (1 - documents) * work(QUERY)
    end, tasks = now() + seconds, []
    while now() < end:
        await asyncio.sleep(dice.expovariate(times * SPEED / mean))
        role: Role = "document" if dice.random() < documents else "query"
        tasks.append(asyncio.create_task(service.embed(role, timeout)))
    return tasks


@pytest.mark.parametrize("documents", [0.0, 0.1], ids=["queries", "mixed"])
@pytest.mark.parametrize("timeout", [1.0, 5.0, 120.0])
@pytest.mark.parametrize("times", [2.0, 5.0])
def test_overload(times: float, timeout: float, documents: float) -> None:
    async def main() -> None:
        service = Service()
        tasks = await overload(service, times, timeout, 10, documents)
        end = now()
        assert service.goodput(2, end) >= 0.9 * SPEED
        assert service.dropped <= 0.01 * len(service.done)

        # Recovery: a query that comes 5 s later is answered as on an idle service, but for the
        # chunk of documents that may be running.
        await asyncio.sleep(5)
        sent = now()
        assert await service.embed("query", timeout) == "done"
        assert now() - sent < 2 * work(DOCUMENTS) / SPEED
        await asyncio.gather(*tasks)
        latencies = sorted(took for role, _, took in service.done if role == "query")
        assert latencies[int(0.99 * len(latencies))] <= min(timeout, 1.3 * MAX_WAIT["query"])

        # What was computed was wanted (less what was admitted before the speed was known), and all
        # places are free.
        assert sum(work(TEXTS[role]) for role, *_ in service.done) >= 0.94 * service.engine.computed
        assert service.admission.texts_in_progress == {"query": 0, "document": 0}
        assert service.admission.wait("document") == 0

    virtual_time.run(main())


def is_refused(admission: Admission, role: Role, timeout: float | None) -> bool:
    try:
        admission.check(role, TEXTS[role], deadline_after(timeout))
    except ServiceUnavailableError:
        return True
    return False


@pytest.mark.parametrize(
    ("speed", "times", "timeout"),
    [
        *((1.0, times, timeout) for times in (2.0, 5.0) for timeout in (1.0, 5.0, 120.0)),
        # As fast as on a GPU, the number of texts is the limit, not their wait.
        (5.0, 2.0, 5.0),
    ],
)
def test_retry_after_is_the_time_after_which_a_retry_succeeds(
    speed: float, times: float, timeout: float
) -> None:
    async def main() -> None:
        service = Service(SerialEngine(speed * SPEED))
        load = asyncio.create_task(overload(service, speed * times, timeout, 12))
        await asyncio.sleep(2)
        ratios = []
        while not load.done():
            before = len(service.refused)
            await asyncio.sleep(0.037)
            if len(service.refused) == before:
                continue
            told = service.refused[-1][2]
            start = now()
            while is_refused(service.admission, "query", timeout):
                await asyncio.sleep(0.005)
            ratios.append(told / max(now() - start, 0.005))
        right = sum(0.5 <= ratio <= 2 for ratio in ratios)
        assert len(ratios) >= 3
        assert right >= 0.8 * len(ratios), ratios

    virtual_time.run(main())


async def test_an_idle_service_admits_any_request_however_slow_the_engine_seems() -> None:
    admission = Admission(clock=now)
    admission.speed.tokens_per_second = 1.0
    with admission.admit("document", DOCUMENTS, now() + 0.5):
        with pytest.raises(ServiceUnavailableError):
            admission.admit("document", DOCUMENTS, now() + 0.5).__enter__()
        with admission.admit("query", QUERY, now() + 3.0):  # waits for no document
            pass


async def test_a_caller_in_a_hurry_does_not_close_the_queue_for_patient_ones() -> None:
    admission = Admission(clock=now)
    admission.speed.tokens_per_second = 100.0
    waiting = ["a" * 600]  # about 2 s, under the limit of 3 s
    with admission.admit("query", waiting):
        wait = admission.wait("query")
        assert 0.3 * MAX_WAIT["query"] < wait < MAX_WAIT["query"]
        assert is_refused(admission, "query", 1.0)
        assert not is_refused(admission, "query", 60.0)
        assert not is_refused(admission, "query", None)
        assert admission.refusing  # a caller in a hurry still has to wait for a shorter queue
    assert not admission.refusing


async def test_a_somewhat_more_patient_caller_is_admitted() -> None:
    admission = Admission(clock=now)
    admission.speed.tokens_per_second = 200.0
    with admission.admit("query", ["a" * 600]):  # about 1 s
        assert 0.8 < admission.wait("query") < 1.2
        assert is_refused(admission, "query", 1.0)
        assert not is_refused(admission, "query", 2.0)


async def test_after_a_refusal_the_queue_has_to_become_shorter() -> None:
    admission = Admission(clock=now)
    admission.speed.tokens_per_second = 100.0
    with admission.admit("query", ["a" * 600]) as first:
        with admission.admit("query", ["a" * 600]):
            assert is_refused(admission, "query", 60.0)
            assert admission.reopens_in("query") == pytest.approx(
                admission.wait("query") - 0.3 * MAX_WAIT["query"]
            )
            assert admission.reopens_in("document") == 0
        admission.speed.tokens_per_second = 100.0
        assert 0.3 * MAX_WAIT["query"] < admission.wait("query") < MAX_WAIT["query"]
        assert is_refused(admission, "query", 60.0)
        first.progress(1)
        assert not is_refused(admission, "query", 60.0)


def test_within_a_role_requests_finish_in_order_of_arrival_and_queries_first() -> None:
    async def main() -> None:
        service = Service()
        order: list[Any] = []

        async def call(role: Role, number: int) -> None:
            assert await service.embed(role, 60.0) == "done"
            order.append((role, number))

        async with asyncio.TaskGroup() as group:
            for number in range(5):
                group.create_task(call("document", number))
            await asyncio.sleep(0.01)
            for number in range(5):
                group.create_task(call("query", number))
        queries = [("query", number) for number in range(5)]
        documents = [("document", number) for number in range(5)]
        assert order == [documents[0], *queries, *documents[1:]]

    virtual_time.run(main())


@pytest.mark.parametrize("wrong", [0.05, 20.0])
def test_a_wrong_speed_is_corrected(wrong: float) -> None:
    async def main() -> None:
        service = Service()
        service.admission.speed.tokens_per_second = wrong * SPEED
        await overload(service, 3.0, 1.0, 20)
        assert service.admission.speed.tokens_per_second == pytest.approx(SPEED, rel=0.2)
        assert service.goodput(now() - 8, now()) >= 0.9 * SPEED

    virtual_time.run(main())


def test_a_changed_speed_is_learnt() -> None:
    async def main() -> None:
        service = Service()
        await overload(service, 3.0, 1.0, 5)
        for factor in (0.3, 1.0):
            service.engine.speed = factor * SPEED
            await overload(service, 3.0, 1.0, 12)
            assert service.goodput(now() - 5, now()) >= 0.9 * factor * SPEED

    virtual_time.run(main())


def test_few_requests_do_not_make_a_batching_engine_look_slow() -> None:
    """It computes 64 texts in the time of one: a burst after a quiet time is not refused."""

    async def main() -> None:
        service = Service(BatchingEngine())
        burst = [service.embed("query", 1.0) for _ in range(600)]
        await asyncio.gather(*burst)
        fast = service.admission.speed.tokens_per_second
        assert fast is not None
        for _ in range(200):
            await service.embed("query", 1.0)
            await asyncio.sleep(0.01)
        assert service.admission.speed.tokens_per_second == pytest.approx(fast, rel=0.05)
        ended = await asyncio.gather(*(service.embed("query", 1.0) for _ in range(600)))
        assert set(ended) == {"done"}

    virtual_time.run(main())


def test_documents_are_admitted_while_queries_leave_the_engine_time_for_them() -> None:
    async def main() -> None:
        service = Service()
        queries = asyncio.create_task(overload(service, 0.5, 5.0, 20))
        await asyncio.sleep(10)
        assert [await service.embed("document", 1.0) for _ in range(8)].count("done") >= 7
        await asyncio.gather(*await queries)

    virtual_time.run(main())


def test_a_cancelled_request_frees_its_capacity_at_once() -> None:
    async def main() -> None:
        service = Service()
        await asyncio.gather(*(service.embed("query", 60.0) for _ in range(20)))
        running = asyncio.create_task(service.embed("document", 60.0))
        waiting = [asyncio.create_task(service.embed("document", 60.0)) for _ in range(50)]
        await asyncio.sleep(0.001)
        assert await service.embed("document", 5.0) == "refused"
        computed = service.engine.computed
        for task in waiting:
            task.cancel()
        await asyncio.sleep(0)
        assert service.admission.texts_in_progress["document"] == len(DOCUMENTS)
        assert await service.embed("document", 5.0) == "done"
        await running
        assert service.engine.computed == computed + work(DOCUMENTS)
        assert service.admission.texts_in_progress == {"query": 0, "document": 0}

    virtual_time.run(main())


def test_retry_after_of_documents_is_the_end_of_the_queue() -> None:
    async def main() -> None:
        service = Service(SerialEngine(jitter=0))
        await service.embed("document", None)
        bulk = [asyncio.create_task(service.embed("document", 600.0)) for _ in range(80)]
        await asyncio.sleep(0.001)
        start = now()
        assert await service.embed("document", 10.0) == "refused"
        told = service.refused[-1][2]
        before = 80 * work(DOCUMENTS) / SPEED
        assert before - DEADLINE_SHARE * 10 < told < before
        while await service.embed("document", 10.0) == "refused":
            await asyncio.sleep(0.1)
        admitted = service.done[-1][1] - service.done[-1][2]
        assert admitted - start == pytest.approx(told, rel=0.2)
        await asyncio.gather(*bulk)

    virtual_time.run(main())


def test_a_request_that_cannot_finish_is_dropped() -> None:
    async def main() -> None:
        service = Service(SerialEngine(jitter=0))
        await service.embed("document", None)
        long = DOCUMENTS * 20  # 5 s of work
        others = asyncio.create_task(service.embed("document", 60.0))
        await asyncio.sleep(0.001)
        assert await service.embed("document", 4.0, long) == "refused"
        await others
        before = service.engine.computed
        ended = asyncio.create_task(service.embed("document", 2.0, long))  # alone, so admitted
        await asyncio.sleep(0.001)
        others = asyncio.create_task(service.embed("document", 60.0))
        assert await ended == "dropped"
        assert service.engine.computed - before <= 2 * work(DOCUMENTS)
        await others

    virtual_time.run(main())


def test_the_number_of_texts_is_limited() -> None:
    admission = Admission({"query": 2, "document": 4})
    with admission.admit("document", ["a"] * 3):
        with pytest.raises(ServiceUnavailableError) as refused:
            admission.admit("document", ["a"] * 2).__enter__()
        assert refused.value.retry_after == 2.0  # nothing is known about the speed
        with admission.admit("query", ["a"] * 2):
            pass
    with admission.admit("document", ["a"] * 5):
        pass


def test_the_limits_are_shorter_than_the_deadline() -> None:
    assert DEADLINE_SHARE < 1
    assert MAX_WAIT["query"] < 5 < MAX_WAIT["document"]


def test_speed_is_work_over_time_of_computing() -> None:
    speed = EngineSpeed()
    assert speed.seconds(1e9) == 0
    for _ in range(10):
        speed.observe(100, 0.02, 1e6)
    assert speed.tokens_per_second == pytest.approx(5_000)
    assert speed.seconds(1_000) == pytest.approx(0.2)
