"""Event loops: several, nested, blocked, cancelled; one thread of ours serves them all."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import dedent, indent

import pytest
from programs import Service, over_http, services


@pytest.fixture(scope="module", params=["local", "http"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with services(request.param) as service:
        yield service


@pytest.fixture(scope="module")
def http() -> Iterator[Service]:
    with over_http() as service:
        yield service


def test_one_loop_after_the_other_and_blocking_calls_in_between(service: Service) -> None:
    service.peers.clear()
    out = service.run("""
        async def main(i):
            return is_of((await client.aembed([f"text {i}"])).vectors[0], i)
        print(asyncio.run(main(0)), right(1), asyncio.run(main(2)), right(3))
        print([name for name in threads() if name == "kalm-io"])
    """)
    assert out == ["True True True True", "['kalm-io']"]
    assert service.peers[:2] == service.peers[2:]  # the connections outlive each loop


def test_a_blocking_call_in_a_coroutine(service: Service) -> None:
    """It holds its own loop up, which is the caller's choice, and waits for nothing there."""
    out = service.run("""
        async def main():
            asyncio.get_running_loop().slow_callback_duration = 60  # -X dev would tell of it
            others = [asyncio.create_task(client.aembed([f"text {i}"])) for i in range(8)]
            await asyncio.sleep(0)
            print(right(9), any(task.done() for task in others))
            results = await asyncio.gather(*others)
            print(all(is_of(result.vectors[0], i) for i, result in enumerate(results)))
        asyncio.run(main())
    """)
    assert out == ["True False", "True"]


def test_a_loop_in_a_thread_of_a_loop(http: Service) -> None:
    """async, which calls sync in a thread, which runs async, which calls sync."""
    out = http.run("""
        async def inner(i):
            assert right(i)
            return is_of((await client.aembed([f"text {i}"])).vectors[0], i)
        def between(i):
            return right(i) and asyncio.run(inner(i))
        async def outer():
            return await asyncio.gather(*(asyncio.to_thread(between, i) for i in range(20)))
        print(all(asyncio.run(outer())))
    """)
    assert out == ["True"]


def test_loops_of_many_threads_at_a_time(http: Service) -> None:
    out = http.run("""
        from concurrent.futures import ThreadPoolExecutor
        async def several(first):
            calls = [client.aembed([f"text {i}"]) for i in range(first, first + 4)]
            results = await asyncio.gather(*calls)
            return [is_of(result.vectors[0], first + i) for i, result in enumerate(results)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i: asyncio.run(several(i % 16)), range(40)))
        print(all(map(all, found)), threads())
    """)
    assert out == ["True ['MainThread', 'kalm-io']"]


BEGINNING = """
client = KalmClient(batch_size=1)
async def told():
    await asyncio.to_thread(sys.stdin.readline)
async def main():
"""
CANCELLED = {
    "a task": """
        task = asyncio.create_task(client.aembed(["never"]))
        await told()
        task.cancel()
        await asyncio.wait([task])
        print(task.cancelled())
    """,
    "a group": """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(client.aembed(["never"]))
                group.create_task(client.aembed(["never again"]))
                await told()
                raise KeyError
        except* KeyError as error:
            print(len(error.exceptions) == 1)
    """,
    "a timeout": """
        try:
            async with asyncio.timeout(None) as timer:
                telling = asyncio.create_task(told())
                telling.add_done_callback(lambda _: timer.reschedule(0))
                await client.aembed(["never"])
        except TimeoutError:
            print(True)
    """,
    "an iterator": """
        parts = client.aiter_embed(["text 0", "never"])
        print(is_of((await anext(parts)).vectors[0], 0))
        await told()
        await parts.aclose()
    """,
    "a loop": """
        task = asyncio.create_task(client.aembed(["never"]))
        await told()
        print(True)
    """,
}
END = """
asyncio.run(main())
sys.stdin.readline()
print(right(1))
"""


@pytest.mark.parametrize("what", CANCELLED)
def test_what_is_cancelled_is_not_in_flight_any_more(http: Service, what: str) -> None:
    body = indent(dedent(CANCELLED[what]), "    ")
    with http.start(BEGINNING + body + END) as program:
        program.wait_until(lambda: "never" in http.waiting)
        program.tell()
        assert program.line() == "True"
        program.wait_until(lambda: not http.waiting)
        program.tell()
        assert program.finish() == ["True"]


def test_a_thread_whose_waiter_was_cancelled_goes_on_and_is_heard(http: Service) -> None:
    """A thread cannot be cancelled; its answer is not lost on another."""
    out = http.run("""
        async def main():
            task = asyncio.create_task(asyncio.to_thread(right, 0))
            await asyncio.sleep(0)
            task.cancel()
            return all(await asyncio.gather(*(asyncio.to_thread(right, i) for i in range(20))))
        print(asyncio.run(main()))
    """)
    assert out == ["True"]
