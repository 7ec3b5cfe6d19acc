"""When a failed request is retried, and how long the client waits before."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_integrations.errors import (
    ContainerFailedError,
    CorruptedAnswerError,
    DeadlineExceededError,
    IdentityMismatchError,
    InvalidInputError,
    InvalidResponseError,
    KalmError,
    RequestTooLargeError,
    ServiceUnavailableError,
    TransportError,
)
from kalm_integrations.retry import RetryPolicy

BUSY = ServiceUnavailableError("The service is busy.")


def delays(error: KalmError, count: int, max_retries: int = 6, concurrency: int = 1) -> list[bool]:
    """Whether each of `count` retries of one request is allowed."""
    policy = RetryPolicy(max_retries, concurrency)
    return [policy.delay(retry, error, time_left=1000) is not None for retry in range(count)]


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
def test_a_permanent_error_is_not_retried(cls):
    assert delays(cls("It happened."), 1) == [False]


@pytest.mark.parametrize(("max_retries", "retried"), [(0, 0), (1, 1), (6, 6)])
def test_a_request_is_retried_at_most_max_retries_times(max_retries, retried):
    expected = [True] * retried + [False] * 3
    assert delays(BUSY, max_retries + 3, max_retries) == expected


@pytest.mark.parametrize(("cls", "retried"), [(ContainerFailedError, 1), (CorruptedAnswerError, 2)])
def test_an_error_with_a_bound_of_its_own_is_retried_less_often(cls, retried):
    assert delays(cls("It happened."), 4) == [True] * retried + [False] * (4 - retried)


def test_no_retry_begins_after_the_deadline():
    policy = RetryPolicy(6, 1)
    busy = ServiceUnavailableError("The service is busy.", retry_after=5)
    assert policy.delay(0, busy, time_left=5) is None
    assert policy.delay(0, busy, time_left=5.6) is not None


def test_failing_requests_share_a_budget_that_successes_refill():
    policy = RetryPolicy(max_retries=2, max_concurrency=3)
    allowed = [policy.delay(0, BUSY, time_left=1000) is not None for _ in range(8)]
    assert allowed == [True] * 6 + [False] * 2
    for _ in range(5):
        policy.succeeded(0)
    assert policy.delay(0, BUSY, time_left=1000) is not None
    assert policy.delay(0, BUSY, time_left=1000) is None


@pytest.mark.parametrize(
    ("retry", "longest"), [(0, 0.5), (1, 1), (2, 2), (5, 16), (6, 30), (7, 30), (99, 30)]
)
def test_the_bound_of_the_delay_doubles_up_to_30_seconds(retry, longest, monkeypatch):
    bounds = []
    monkeypatch.setattr(random, "uniform", lambda low, high: bounds.append((low, high)) or high)
    assert RetryPolicy(100, 1).delay(retry, BUSY, time_left=1000) == longest
    assert bounds == [(0, longest)]


@pytest.mark.parametrize("retry_after", [None, 0.0, 20.0])
def test_delays_are_spread_over_the_whole_interval(retry_after):
    busy = ServiceUnavailableError("The service is busy.", retry_after=retry_after)
    policy = RetryPolicy(6, 1000)
    spread = [policy.delay(3, busy, time_left=1000) - (retry_after or 0) for _ in range(1000)]
    assert {int(delay / 4 * 10) for delay in spread} == set(range(10))


@given(retry=st.integers(0, 99), retry_after=st.floats(0, 1e4))
def test_a_retry_waits_for_retry_after_up_to_a_minute_and_little_longer(retry, retry_after):
    busy = ServiceUnavailableError("The service is busy.", retry_after=retry_after)
    delay = RetryPolicy(100, 1).delay(retry, busy, time_left=1e5)
    capped = min(retry_after, 60)
    assert capped <= delay <= capped + min(30, 0.5 * 2**retry)


@pytest.mark.parametrize("retry_after", [float("nan"), -1.0])
def test_an_impossible_retry_after_is_ignored(retry_after):
    busy = ServiceUnavailableError("The service is busy.", retry_after=retry_after)
    assert 0 <= RetryPolicy(6, 1).delay(0, busy, time_left=1000) <= 0.5
