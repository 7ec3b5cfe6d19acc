"""Turns at an engine: who goes next, and that nobody who gives up takes the lock along."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modal_backend.engines.turns import Place, Turns

QUERY, DOCUMENT = 0, 1


async def ticks(number: int = 5) -> None:
    """Let every task that can go on do so."""
    for _ in range(number):
        await asyncio.sleep(0)


async def hold(turns: Turns, place: Place, order: list[Place]) -> None:
    async with turns.turn(place):
        order.append(place)
        await asyncio.sleep(0)


async def free(turns: Turns) -> bool:
    """Whether the lock can be had at once."""
    had: list[Place] = []
    attempt = asyncio.create_task(hold(turns, turns.place(QUERY), had))
    await ticks()
    attempt.cancel()
    await ticks()
    return bool(had)


async def order_of_turns(turns: Turns, places: list[Place]) -> list[Place]:
    """Who has the lock after whom, once all are waiting, in the order given, for one holder."""
    order: list[Place] = []
    async with (
        asyncio.timeout(5),
        asyncio.TaskGroup() as group,
        turns.turn(turns.place(QUERY)),
    ):
        for place in places:
            group.create_task(hold(turns, place, order))
            await asyncio.sleep(0)
        assert order == []
    return order


async def test_a_query_goes_before_documents_that_came_earlier():
    turns = Turns()
    first, second, query = turns.place(DOCUMENT), turns.place(DOCUMENT), turns.place(QUERY)
    assert await order_of_turns(turns, [first, second, query]) == [query, first, second]


async def test_a_call_that_comes_back_goes_before_those_that_came_after_it_but_wait_longer():
    turns = Turns()
    early, late = turns.place(DOCUMENT), turns.place(DOCUMENT)
    for _ in range(3):
        assert await order_of_turns(turns, [late, early]) == [early, late]


@given(st.lists(st.integers(0, 3), max_size=12), st.randoms())
def test_the_most_urgent_goes_first_and_among_equals_the_earliest_arrival(priorities, random):
    turns = Turns()
    places = [turns.place(priority) for priority in priorities]
    ranked = [places[n] for n in sorted(range(len(places)), key=priorities.__getitem__)]
    random.shuffle(places)
    assert asyncio.run(order_of_turns(turns, places)) == ranked


async def test_a_free_lock_is_had_at_once_and_a_held_one_is_not():
    turns = Turns()
    for priority in (DOCUMENT, QUERY, DOCUMENT):
        async with turns.turn(turns.place(priority)):
            assert not await free(turns)
        assert await free(turns)


async def test_an_exception_inside_a_turn_ends_it():
    turns = Turns()
    with pytest.raises(KeyError):
        async with turns.turn(turns.place(QUERY)):
            raise KeyError
    assert await free(turns)


async def test_whoever_gives_up_waiting_is_passed_over():
    turns, order = Turns(), []
    places = [turns.place(DOCUMENT) for _ in range(3)]
    async with turns.turn(turns.place(DOCUMENT)):
        waiting = [asyncio.create_task(hold(turns, place, order)) for place in places]
        await ticks()
        waiting[0].cancel()
        waiting[1].cancel()
        await ticks()
    await ticks()
    assert order == [places[2]]
    assert await free(turns)


@pytest.mark.parametrize("others", [0, 1, 2])
async def test_whoever_is_cancelled_as_the_turn_comes_hands_it_on(others):
    turns, order = Turns(), []
    places = [turns.place(DOCUMENT) for _ in range(1 + others)]
    async with turns.turn(turns.place(DOCUMENT)):
        waiting = [asyncio.create_task(hold(turns, place, order)) for place in places]
        await ticks()
    waiting[0].cancel()  # after the hand-over just now, before the task's own next step
    await ticks(10)
    assert waiting[0].cancelled()
    assert order == places[1:]
    assert await free(turns)


async def test_a_turn_cancelled_while_it_is_held_ends():
    turns, order = Turns(), []
    holder = asyncio.create_task(hold(turns, turns.place(DOCUMENT), order))
    await asyncio.sleep(0)
    holder.cancel()
    await ticks()
    assert holder.cancelled()
    assert len(order) == 1
    assert await free(turns)


async def play(script: list[tuple[int, int, int, int | None]]) -> None:
    turns, inside = Turns(), 0

    async def act(enter: int, priority: int, held: int) -> None:
        nonlocal inside
        await ticks(enter)
        async with turns.turn(turns.place(priority)):
            inside += 1
            assert inside == 1
            try:
                await ticks(held)
            finally:
                inside -= 1

    actors = [asyncio.create_task(act(*part)) for *part, _ in script]
    for now in range(100):
        for actor, (*_, cancelled_at) in zip(actors, script, strict=True):
            if cancelled_at == now:
                actor.cancel()
        await asyncio.sleep(0)
    for actor, (*_, cancelled_at) in zip(actors, script, strict=True):
        assert actor.done(), "waits for a turn that never comes"
        assert actor.cancelled() <= (cancelled_at is not None)
        assert actor.cancelled() or actor.exception() is None
    assert await free(turns)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(  # tick of entry, priority, ticks held, tick of cancellation
            st.integers(0, 4), st.integers(0, 2), st.integers(0, 3), st.none() | st.integers(0, 11)
        ),
        max_size=8,
    )
)
def test_cancelled_at_any_moment_nobody_loses_the_lock_and_no_two_ever_hold_it(script):
    asyncio.run(play(script))


async def test_calls_of_many_turns_finish_one_after_the_other_in_order_of_arrival() -> None:
    turns, order = Turns(), []

    async def call(name: str) -> None:
        place = turns.place(DOCUMENT)
        for _ in range(3):
            async with turns.turn(place):
                order.append(name)
                await asyncio.sleep(0)

    await asyncio.gather(*map(call, "abc"))
    assert "".join(order) == "aaabbbccc"


async def test_a_place_whose_wait_was_cancelled_can_wait_again() -> None:
    turns, order = Turns(), []
    place = turns.place(DOCUMENT)
    async with turns.turn(turns.place(QUERY)):
        gave_up = asyncio.create_task(hold(turns, place, order))
        await ticks()
        gave_up.cancel()
        again = asyncio.create_task(hold(turns, place, order))
        await ticks()
    await again
    assert order == [place]
