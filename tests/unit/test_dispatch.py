"""The dispatcher: concurrency, order and failures, with a sync and an async driver that agree.

Time is virtual: waiting for a result completes the request that is due next, so that both drivers
see the same schedule.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_integrations import dispatch
from kalm_integrations.batching import Batch
from kalm_integrations.config import ClientConfig
from kalm_integrations.dispatch import Dispatcher
from kalm_integrations.errors import (
    DeadlineExceededError,
    InputTooLongError,
    InvalidInputError,
    ServiceUnavailableError,
    TransportError,
)
from kalm_integrations.result import EmbeddedBatch, Usage
from kalm_integrations.session import CallSettings

CALL = CallSettings(role="document", timeout=60)
BUSY = ServiceUnavailableError("The service is busy.")
INVALID = InvalidInputError("texts[0] is empty.")


@dataclass(frozen=True)
class Request:
    """What happens to one request: how long it takes, and what it fails with."""

    delay: int = 1
    failure: BaseException | None = None


@dataclass
class Service:
    """Completes requests in virtual time; stands in for the background loop."""

    requests: list[Request]
    now: int = 0
    started: int = 0
    most_running: int = 0
    cancelled: list[int] = field(default_factory=list)
    _running: list[tuple[int, int, Future[EmbeddedBatch]]] = field(default_factory=list)

    def submit(self, coroutine: Any) -> Future[EmbeddedBatch]:
        coroutine.close()
        future: Future[EmbeddedBatch] = Future()
        number, self.started = self.started, self.started + 1
        heapq.heappush(self._running, (self.now + self.requests[number].delay, number, future))
        running = [each for _, _, each in self._running if not each.done()]
        self.most_running = max(self.most_running, len(running))
        return future

    def advance(self) -> None:
        """Complete the request that is due next."""
        while self._running:
            self.now, number, future = heapq.heappop(self._running)
            if future.cancelled():
                self.cancelled.append(number)
                continue
            failure = self.requests[number].failure
            if failure is None:
                result = EmbeddedBatch(np.array([number]), np.ones((1, 4)), Usage(requests=1))
                future.set_result(result)
            else:
                future.set_exception(failure)
            return


class Completed:
    """What the async driver may await; the sync one ignores it."""

    def __await__(self) -> Iterator[None]:
        return iter(())


@dataclass(frozen=True)
class Outcome:
    """What a caller sees of a call, and what the service did for it."""

    results: list[int]
    failure: type[BaseException] | None
    started: int
    most_running: int


def run_sync(
    requests: list[Request], limit: int, batches: Iterator[Batch] | None = None
) -> Outcome:
    return _run(requests, limit, batches, _collect_sync)


def run_async(
    requests: list[Request], limit: int, batches: Iterator[Batch] | None = None
) -> Outcome:
    def collect(*arguments: Any) -> None:
        asyncio.run(_collect_async(*arguments))

    return _run(requests, limit, batches, collect)


def _run(
    requests: list[Request],
    limit: int,
    batches: Iterator[Batch] | None,
    collect: Callable[..., None],
) -> Outcome:
    service, results, failure = Service(requests), [], None
    dispatcher = Dispatcher(ClientConfig(backend="local", max_concurrency=limit))
    if batches is None:
        batches = iter([Batch([f"text {n}"], [[n]]) for n in range(len(requests))])

    class Event:
        """Set at once: by the time that anybody waits, something is due."""

        def set(self, _: None = None) -> None: ...

        put = set

        def clear(self) -> None: ...

        def wait(self) -> Completed:
            service.advance()
            return Completed()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "background_loop", lambda: service)
        patch.setattr(dispatch, "new_event", Event)
        patch.setattr(dispatch.asyncio, "Event", Event)
        try:
            collect(dispatcher, batches, results)
        except BaseException as error:
            failure = error
    return Outcome(
        results, type(failure) if failure else None, service.started, service.most_running
    )


def _collect_sync(dispatcher: Dispatcher, batches: Iterator[Batch], results: list[int]) -> None:
    for part in dispatcher.run(batches, CALL):
        results += part.indices.tolist()


async def _collect_async(
    dispatcher: Dispatcher, batches: Iterator[Batch], results: list[int]
) -> None:
    async for part in dispatcher.arun(batches, CALL):
        results += part.indices.tolist()


BOTH = pytest.mark.parametrize("run", [run_sync, run_async])
FAILURES = st.sampled_from(
    [None, None, None, INVALID, InputTooLongError("x"), BUSY, DeadlineExceededError("late")]
)
SCHEDULES = st.lists(st.builds(Request, st.integers(0, 5), FAILURES), max_size=12)


@given(SCHEDULES, st.integers(1, 5))
def test_both_drivers_have_the_same_outcome_and_lose_no_result(
    requests: list[Request], limit: int
) -> None:
    outcome = run_sync(requests, limit)
    assert outcome == run_async(requests, limit)
    assert outcome.most_running <= limit
    assert len(set(outcome.results)) == len(outcome.results)
    failures = [each.failure for each in requests[: outcome.started] if each.failure]
    if not failures:
        assert sorted(outcome.results) == list(range(len(requests)))
        assert outcome.failure is None
    else:
        assert outcome.failure in {type(failure) for failure in failures}
    if all(isinstance(failure, InvalidInputError) for failure in failures):
        started = range(outcome.started)
        assert sorted(outcome.results) == [n for n in started if requests[n].failure is None]


@BOTH
def test_results_arrive_in_order_of_completion(run: Callable[..., Outcome]) -> None:
    assert run([Request(3), Request(1), Request(2)], 3).results == [1, 2, 0]


@BOTH
def test_a_free_slot_is_filled_before_the_next_result(run: Callable[..., Outcome]) -> None:
    outcome = run([Request(9), Request(1), Request(1), Request(1)], 2)
    assert outcome.results == [1, 2, 3, 0]
    assert outcome.most_running == 2


@BOTH
@pytest.mark.parametrize("failure", [BUSY, DeadlineExceededError("late"), KeyError("a bug")])
def test_a_failure_cancels_other_requests_and_stops_reading(
    run: Callable[..., Outcome], failure: Exception
) -> None:
    outcome = run([Request(5), Request(1, failure), Request(5), Request(1)], 3)
    assert (outcome.results, outcome.failure, outcome.started) == ([], type(failure), 3)


@BOTH
def test_invalid_texts_stop_reading_but_cancel_no_request(
    run: Callable[..., Outcome],
) -> None:
    outcome = run([Request(1, INVALID), Request(5), Request(1)], 2)
    assert (outcome.results, outcome.failure, outcome.started) == ([1], InvalidInputError, 2)


@BOTH
def test_the_first_failure_is_raised_unless_it_is_about_invalid_texts(
    run: Callable[..., Outcome],
) -> None:
    assert run([Request(2, TransportError("x")), Request(1, BUSY)], 2).failure is type(BUSY)
    assert run([Request(1, INVALID), Request(2, BUSY)], 2).failure is type(BUSY)


@BOTH
def test_batches_are_read_only_for_free_slots(run: Callable[..., Outcome]) -> None:
    read: list[int] = []

    def endless() -> Iterator[Batch]:
        for n in count():
            read.append(n)
            yield Batch(["text"], [[n]])

    assert run([Request(1, BUSY)] * 9, 2, endless()).failure is type(BUSY)
    assert read == [0, 1]


@BOTH
def test_a_failure_of_the_source_is_raised_after_running_requests(
    run: Callable[..., Outcome],
) -> None:
    def source() -> Iterator[Batch]:
        yield Batch(["text"], [[0]])
        raise OSError("the disk is gone")

    outcome = run([Request(5)], 2, source())
    assert (outcome.results, outcome.failure) == ([0], OSError)


@BOTH
def test_an_interrupt_while_reading_ends_the_call_immediately(run: Callable[..., Outcome]) -> None:
    def source() -> Iterator[Batch]:
        yield Batch(["text"], [[0]])
        raise KeyboardInterrupt

    outcome = run([Request(5)], 2, source())
    assert (outcome.results, outcome.failure) == ([], KeyboardInterrupt)


@BOTH
def test_a_request_cancelled_from_outside_is_a_failure(
    run: Callable[..., Outcome],
) -> None:
    assert run([Request(1, CancelledError()), Request(5)], 2).failure is CancelledError
