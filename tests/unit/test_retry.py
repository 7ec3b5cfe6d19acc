"""When a request is tried again, and how long the client waits before."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_integrations.errors import (
    DeadlineExceededError,
    IdentityMismatchError,
    InvalidInputError,
    InvalidResponseError,
    RequestTooLargeError,
    ServiceUnavailableError,
    TransportError,
)
from kalm_integrations.retry import delay_before

BUSY = ServiceUnavailableError("The service is busy.")


@pytest.mark.parametrize(
    "cls",
    [
        DeadlineExceededError,
        IdentityMismatchError,
        InvalidInputError,
        InvalidResponseError,
        RequestTooLargeError,
        TransportError,
    ],
)
def test_what_waiting_cannot_mend_is_not_tried_again(cls):
    assert delay_before(0, cls("It happened."), max_retries=6) is None


@pytest.mark.parametrize(("max_retries", "retried"), [(0, 0), (1, 1), (6, 6)])
def test_a_request_is_tried_again_max_retries_times(max_retries, retried):
    delays = [delay_before(retry, BUSY, max_retries) for retry in range(max_retries + 3)]
    assert [delay is not None for delay in delays] == [True] * retried + [False] * 3


@pytest.mark.parametrize(
    ("retry", "longest"), [(0, 0.5), (1, 1), (2, 2), (5, 16), (6, 30), (7, 30), (99, 30)]
)
def test_a_wait_is_drawn_from_0_to_a_bound_that_doubles_up_to_30_seconds(
    retry, longest, monkeypatch
):
    bounds = []
    monkeypatch.setattr(random, "uniform", lambda low, high: bounds.append((low, high)) or high)
    assert delay_before(retry, BUSY, max_retries=100) == longest
    assert bounds == [(0, longest)]


@pytest.mark.parametrize("asked", [None, 0.0, 20.0])
def test_waits_are_spread_so_that_clients_do_not_come_back_together(asked):
    busy = ServiceUnavailableError("The service is busy.", retry_after=asked)
    waits = [delay_before(3, busy, max_retries=6) - (asked or 0) for _ in range(1000)]
    assert {int(wait / 4 * 10) for wait in waits} == set(range(10))


@given(retry=st.integers(0, 99), asked=st.floats(0, 1e4))
def test_no_retry_comes_sooner_than_the_service_asked_nor_much_later(retry, asked):
    busy = ServiceUnavailableError("The service is busy.", retry_after=asked)
    wait = delay_before(retry, busy, max_retries=100)
    assert asked <= wait <= asked + min(30, 0.5 * 2**retry)
