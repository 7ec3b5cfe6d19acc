"""Requests in flight: their number, their order of landing, and one that fails."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future
from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kalm_integrations.flight import Flight

from kalm_integrations.batching import Batch
from kalm_integrations.errors import (
    DeadlineExceededError,
    InputTooLongError,
    InvalidInputError,
    ServiceUnavailableError,
    TransportError,
)
from kalm_integrations.result import EmbeddedBatch, Usage

BUSY = ServiceUnavailableError("The service is busy.")
INVALID = InvalidInputError("texts[0] is empty.")


def part(index: int) -> EmbeddedBatch:
    return EmbeddedBatch(np.array([index]), np.ones((1, 4)), Usage(requests=1))


def batches(number: int) -> list[Batch]:
    return [Batch([f"text {index}"], [[index]]) for index in range(number)]


def launched(number: int, limit: int = 16) -> tuple[Flight, list[Future[EmbeddedBatch]]]:
    """A flight of `number` requests that wait for the test to answer them."""
    flight, futures = Flight(limit, lambda: None), [Future() for _ in range(number)]
    for future in futures:
        flight.launch(future)
    return flight, futures


def taken(flight: Flight) -> list[int]:
    return [int(part.indices[0]) for part in flight.take()]


def test_it_is_full_at_its_limit_until_something_that_landed_was_taken():
    flight, futures = launched(1, limit=2)
    assert not flight.full
    flight.launch(Future())
    assert flight.full
    futures[0].set_result(part(0))
    assert flight.full
    assert taken(flight) == [0]
    assert not flight.full
    assert flight.flying


def test_parts_are_handed_out_in_order_of_landing_each_once():
    flight, futures = launched(3)
    futures[2].set_result(part(2))
    futures[0].set_result(part(0))
    assert taken(flight) == [2, 0]
    assert taken(flight) == []
    futures[1].set_result(part(1))
    assert taken(flight) == [1]
    assert not flight.flying
    flight.finish()


def test_whoever_is_woken_finds_what_landed():
    woken = []
    flight = Flight(1, lambda: woken.append((threading.current_thread(), taken(flight))))
    future: Future[EmbeddedBatch] = Future()
    flight.launch(future)
    lander = threading.Thread(target=future.set_result, args=[part(5)])
    lander.start()
    lander.join()
    assert woken == [(lander, [5])]


def test_a_request_that_landed_before_it_was_watched_is_not_lost():
    woken = []
    flight, future = Flight(1, lambda: woken.append(True)), Future()
    future.set_result(part(0))
    flight.launch(future)
    assert woken == [True]
    assert taken(flight) == [0]


@pytest.mark.parametrize("failure", [BUSY, DeadlineExceededError("late"), KeyError("a bug")])
def test_a_failure_cancels_the_others_and_stops_the_reading(failure):
    flight, futures = launched(3)
    reading = flight.read(iter(batches(2)))
    next(reading)
    futures[1].set_exception(failure)
    assert taken(flight) == []
    assert futures[0].cancelled()
    assert futures[2].cancelled()
    assert list(reading) == []
    assert taken(flight) == []
    assert not flight.flying
    with pytest.raises(type(failure)) as caught:
        flight.finish()
    assert caught.value is failure


@pytest.mark.parametrize("failure", [INVALID, InputTooLongError("texts[0] is too long.")])
def test_texts_that_cannot_be_embedded_stop_the_reading_but_let_the_others_land(failure):
    flight, futures = launched(2)
    reading = flight.read(iter(batches(2)))
    next(reading)
    futures[0].set_exception(failure)
    assert taken(flight) == []
    assert list(reading) == []
    assert not futures[1].cancelled()
    assert flight.flying
    futures[1].set_result(part(1))
    assert taken(flight) == [1]
    with pytest.raises(InvalidInputError) as caught:
        flight.finish()
    assert caught.value is failure


def test_the_failure_comes_after_everything_that_landed_with_it():
    flight, futures = launched(3)
    futures[0].set_result(part(0))
    futures[1].set_exception(BUSY)
    futures[2].set_result(part(2))
    assert taken(flight) == [0, 2]
    with pytest.raises(ServiceUnavailableError):
        flight.finish()


def test_of_several_failures_the_first_is_raised():
    flight, futures = launched(2)
    futures[1].set_exception(BUSY)
    futures[0].set_exception(TransportError("later"))
    assert taken(flight) == []
    with pytest.raises(ServiceUnavailableError):
        flight.finish()


def test_a_failure_that_concerns_all_comes_before_texts_that_cannot_be_embedded():
    flight, futures = launched(3)
    futures[1].set_exception(INVALID)
    futures[0].set_exception(BUSY)
    assert taken(flight) == []
    assert futures[2].cancelled()
    with pytest.raises(ServiceUnavailableError):
        flight.finish()


def test_a_request_that_can_no_longer_be_cancelled_still_lands():
    flight, (running, failed) = launched(2)
    running.set_running_or_notify_cancel()
    failed.set_exception(BUSY)
    assert taken(flight) == []
    assert flight.flying
    running.set_result(part(0))
    assert taken(flight) == [0]


def test_a_request_cancelled_from_outside_is_a_failure_like_any_other():
    flight, futures = launched(2)
    futures[0].cancel()
    assert taken(flight) == []
    assert futures[1].cancelled()
    with pytest.raises(CancelledError):
        flight.finish()


def test_cancelling_ends_what_flies_and_leaves_what_landed():
    flight, futures = launched(2)
    futures[0].set_result(part(0))
    flight.cancel()
    assert futures[1].cancelled()
    assert taken(flight) == [0]


def test_reading_hands_out_every_batch():
    flight = Flight(1, lambda: None)
    assert list(flight.read(iter(batches(3)))) == batches(3)
    flight.finish()


def test_reading_is_lazy_so_that_memory_stays_bounded():
    read = []
    reading = Flight(1, lambda: None).read(Batch([], [], read.append(n) or ()) for n in count())
    next(reading)
    assert read == [0]


def test_a_source_that_fails_ends_the_reading_and_is_raised_after_what_was_in_flight():
    def source():
        yield from batches(1)
        raise OSError("the disk is gone")

    flight, futures = launched(1)
    assert list(flight.read(source())) == batches(1)
    assert not futures[0].cancelled()
    futures[0].set_result(part(0))
    assert taken(flight) == [0]
    with pytest.raises(OSError, match="the disk is gone"):
        flight.finish()


def test_an_interrupt_while_reading_is_not_put_off():
    def source():
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        next(Flight(1, lambda: None).read(source()))


@given(st.data())
def test_whatever_lands_in_whatever_order_is_handed_out_once_and_invalid_texts_cost_nothing(data):
    order = data.draw(st.permutations(range(data.draw(st.integers(0, 12)))))
    failing = data.draw(st.sets(st.sampled_from(order))) if order else set()
    flight, futures = launched(len(order))
    got = []
    for index in order:
        if index in failing:
            futures[index].set_exception(INVALID)
        else:
            futures[index].set_result(part(index))
        if data.draw(st.booleans()):
            got += taken(flight)
    got += taken(flight)
    assert got == [index for index in order if index not in failing]
    assert not flight.flying
