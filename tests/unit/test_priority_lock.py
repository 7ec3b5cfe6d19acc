"""The order in which a `PriorityLock` is granted, and that a cancelled task never keeps it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modal_backend.engines.priority_lock import PriorityLock, Ticket

QUERY, DOCUMENT = 0, 1


async def ticks(number: int = 5) -> None:
    """Let every task that can go on do so."""
    for _ in range(number):
        await asyncio.sleep(0)


async def hold(lock: PriorityLock, ticket: Ticket, order: list[Ticket]) -> None:
    async with lock.hold(ticket):
        order.append(ticket)
        await asyncio.sleep(0)


async def free(lock: PriorityLock) -> bool:
    """Whether the lock can be had at once."""
    had: list[Ticket] = []
    attempt = asyncio.create_task(hold(lock, lock.ticket(QUERY), had))
    await ticks()
    attempt.cancel()
    await ticks()
    return bool(had)


async def order_of_holders(lock: PriorityLock, tickets: list[Ticket]) -> list[Ticket]:
    """Who has the lock after whom, once all are waiting, in the order given, for one holder."""
    order: list[Ticket] = []
    async with (
        asyncio.timeout(5),
        asyncio.TaskGroup() as group,
        lock.hold(lock.ticket(QUERY)),
    ):
        for ticket in tickets:
            group.create_task(hold(lock, ticket, order))
            await asyncio.sleep(0)
        assert order == []
    return order


async def test_a_query_goes_before_documents_that_came_earlier():
    lock = PriorityLock()
    first, second, query = lock.ticket(DOCUMENT), lock.ticket(DOCUMENT), lock.ticket(QUERY)
    assert await order_of_holders(lock, [first, second, query]) == [query, first, second]


async def test_an_earlier_ticket_goes_first_even_if_it_waits_later():
    lock = PriorityLock()
    early, late = lock.ticket(DOCUMENT), lock.ticket(DOCUMENT)
    for _ in range(3):
        assert await order_of_holders(lock, [late, early]) == [early, late]


@given(st.lists(st.integers(0, 3), max_size=12), st.randoms())
def test_the_lock_is_granted_by_priority_and_arrival(priorities, random):
    lock = PriorityLock()
    tickets = [lock.ticket(priority) for priority in priorities]
    ranked = [tickets[n] for n in sorted(range(len(tickets)), key=priorities.__getitem__)]
    random.shuffle(tickets)
    assert asyncio.run(order_of_holders(lock, tickets)) == ranked


async def test_only_a_free_lock_is_granted_at_once():
    lock = PriorityLock()
    for priority in (DOCUMENT, QUERY, DOCUMENT):
        async with lock.hold(lock.ticket(priority)):
            assert not await free(lock)
        assert await free(lock)


async def test_an_exception_releases_the_lock():
    lock = PriorityLock()
    with pytest.raises(KeyError):
        async with lock.hold(lock.ticket(QUERY)):
            raise KeyError
    assert await free(lock)


async def test_cancelled_waiters_are_skipped():
    lock, order = PriorityLock(), []
    tickets = [lock.ticket(DOCUMENT) for _ in range(3)]
    async with lock.hold(lock.ticket(DOCUMENT)):
        waiting = [asyncio.create_task(hold(lock, ticket, order)) for ticket in tickets]
        await ticks()
        waiting[0].cancel()
        waiting[1].cancel()
        await ticks()
    await ticks()
    assert order == [tickets[2]]
    assert await free(lock)


@pytest.mark.parametrize("others", [0, 1, 2])
async def test_a_task_cancelled_as_the_lock_is_granted_releases_it(others):
    lock, order = PriorityLock(), []
    tickets = [lock.ticket(DOCUMENT) for _ in range(1 + others)]
    async with lock.hold(lock.ticket(DOCUMENT)):
        waiting = [asyncio.create_task(hold(lock, ticket, order)) for ticket in tickets]
        await ticks()
    waiting[0].cancel()  # after the hand-over just now, before the task's own next step
    await ticks(10)
    assert waiting[0].cancelled()
    assert order == tickets[1:]
    assert await free(lock)


async def test_a_task_cancelled_while_it_holds_the_lock_releases_it():
    lock, order = PriorityLock(), []
    holder = asyncio.create_task(hold(lock, lock.ticket(DOCUMENT), order))
    await asyncio.sleep(0)
    holder.cancel()
    await ticks()
    assert holder.cancelled()
    assert len(order) == 1
    assert await free(lock)


async def play(script: list[tuple[int, int, int, int | None]]) -> None:
    lock, inside = PriorityLock(), 0

    async def act(enter: int, priority: int, held: int) -> None:
        nonlocal inside
        await ticks(enter)
        async with lock.hold(lock.ticket(priority)):
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
        assert actor.done(), "waits for a lock that is never granted"
        assert actor.cancelled() <= (cancelled_at is not None)
        assert actor.cancelled() or actor.exception() is None
    assert await free(lock)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(  # tick of entry, priority, ticks held, tick of cancellation
            st.integers(0, 4), st.integers(0, 2), st.integers(0, 3), st.none() | st.integers(0, 11)
        ),
        max_size=8,
    )
)
def test_cancellation_at_any_moment_keeps_the_lock_exclusive_and_available(script):
    asyncio.run(play(script))


async def test_calls_of_several_chunks_finish_in_order_of_arrival() -> None:
    lock, order = PriorityLock(), []

    async def call(name: str) -> None:
        ticket = lock.ticket(DOCUMENT)
        for _ in range(3):
            async with lock.hold(ticket):
                order.append(name)
                await asyncio.sleep(0)

    await asyncio.gather(*map(call, "abc"))
    assert "".join(order) == "aaabbbccc"


async def test_a_ticket_can_wait_again_after_a_cancellation() -> None:
    lock, order = PriorityLock(), []
    ticket = lock.ticket(DOCUMENT)
    async with lock.hold(lock.ticket(QUERY)):
        gave_up = asyncio.create_task(hold(lock, ticket, order))
        await ticks()
        gave_up.cancel()
        again = asyncio.create_task(hold(lock, ticket, order))
        await ticks()
    await again
    assert order == [ticket]
