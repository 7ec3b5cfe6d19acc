"""The arithmetic of costs, against sums by hand and against a simulation."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modal_backend import costs, gpus
from modal_backend.costs import DAY, choices, uptime

PER_DAY = st.floats(0.01, 1e8)
WINDOWS = st.floats(2, 3600)
STARTS = st.floats(0, 600)


def simulated(per_day: float, window: float, start: float, queries: int) -> costs.Uptime:
    """A container, query by query, without the formula."""
    drawn = random.Random(7)
    now = up = 0.0
    starts = waiting = 0
    ready = gone = -1.0  # when the container is ready, and when it goes if nobody comes
    for _ in range(queries):
        now += drawn.expovariate(per_day / DAY)
        if now >= gone:
            starts += 1
            ready = now + start
            up += start
            waiting += 1
            idle_from = ready
        elif now < ready:
            waiting += 1
            continue  # it is served when the container is ready, from when idling counts already
        else:
            idle_from = now
        up += window if idle_from == ready else window - (gone - idle_from)
        gone = idle_from + window
    return costs.Uptime(share=up / now, starts=starts / now * DAY, waiting=waiting / queries)


@pytest.mark.parametrize(
    ("per_day", "window", "start"),
    [
        (10, 300, 20),  # nearly every query finds it asleep
        (288, 300, 20),  # one in a window, on average
        (288, 300, 0),
        (1000, 300, 20),
        (5000, 60, 120),  # several come while it starts
        (100_000, 2, 30),
    ],
)
def test_uptime_matches_a_simulation(per_day: float, window: float, start: float) -> None:
    formula, seen = uptime(per_day, window, start), simulated(per_day, window, start, 200_000)
    assert formula.share == pytest.approx(seen.share, rel=0.02)
    assert formula.starts == pytest.approx(seen.starts, rel=0.03)
    assert formula.waiting == pytest.approx(seen.waiting, rel=0.03)


@given(PER_DAY, WINDOWS, STARTS)
@example(1e8, 3600, 600)  # exp(λT) would overflow
def test_shares_are_between_0_and_1_and_starts_never_exceed_queries(
    per_day: float, window: float, start: float
) -> None:
    up = uptime(per_day, window, start)
    assert 0 <= up.share <= 1
    assert 0 <= up.starts <= per_day * (1 + 1e-9)
    assert up.starts / per_day <= up.waiting * (1 + 1e-9) <= 1 + 1e-8


@given(PER_DAY, WINDOWS, STARTS, st.floats(1.01, 3))
def test_more_queries_and_longer_windows_increase_uptime(
    per_day: float, window: float, start: float, more: float
) -> None:
    up = uptime(per_day, window, start)
    busier, patient = uptime(more * per_day, window, start), uptime(per_day, more * window, start)
    assert busier.share >= up.share - 1e-12
    assert busier.waiting <= up.waiting + 1e-12
    assert patient.share >= up.share - 1e-12
    assert patient.starts <= up.starts * (1 + 1e-12)


@given(st.floats(1, 1e5), st.floats(2, 600))
def test_with_instant_starts_uptime_is_the_chance_of_a_query_within_the_window(
    per_day: float, window: float
) -> None:
    rate = per_day / DAY
    up = uptime(per_day, window, 0)
    assert up.share == pytest.approx(1 - math.exp(-rate * window), abs=1e-9)
    assert up.starts == pytest.approx(per_day * math.exp(-rate * window), rel=1e-9)


@given(PER_DAY, WINDOWS, STARTS)
def test_each_start_ends_one_idle_period(per_day: float, window: float, start: float) -> None:
    """An idle period lasts 1 / λ on average."""
    up = uptime(per_day, window, start)
    assert 1 - up.share == pytest.approx(up.starts / per_day, abs=1e-9)


def one(gpu: str = "H100", quantization: gpus.Quantization = "none") -> costs.Choice:
    (choice,) = choices([gpu], quantization)
    return choice


@given(st.floats(1, 1e12), WINDOWS, STARTS)
def test_a_corpus_costs_a_start_its_tokens_and_the_idle_window(
    tokens: float, window: float, start: float
) -> None:
    choice = one()
    job = choice.job(tokens, window, start)
    computing = tokens / choice.rate.tokens
    assert 3600 * job.hours == pytest.approx(start + computing)
    assert job.dollars == pytest.approx((start + computing + window) * choice.dollars)


def test_choices_are_all_gpus_or_the_named_ones() -> None:
    assert len(choices()) == len(gpus.QUANTIZATIONS) * len(gpus.GPUS)
    assert {choice.quantization for choice in choices(quantization="fp8")} == {"fp8"}
    assert [choice.gpu for choice in choices(["H100!", "L4"], "none")] == ["L4", "H100"]
    for choice in choices():
        assert choice.problem == gpus.problem(choice.gpu, choice.quantization)
        assert choice.dollars == gpus.container_dollars([choice.gpu], choice.quantization)
    with pytest.raises(ValueError, match="there is no such GPU"):
        choices(["H100", "H1000000"])
