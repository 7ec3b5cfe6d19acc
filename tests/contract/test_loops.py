"""Several, nested, blocked and cancelled event loops share one background thread."""

from __future__ import annotations

from textwrap import dedent, indent

import pytest
from programs import Service


def test_connections_outlive_the_callers_event_loop(http: Service) -> None:
    http.peers.clear()
    out = http.run("""
        async def main(i):
            return is_of((await client.aembed([f"text {i}"])).vectors[0], i)
        print(asyncio.run(main(0)), right(1), asyncio.run(main(2)), right(3))
        print([name for name in threads() if name == "kalm-io"])
    """)
    assert out == ["True True True True", "['kalm-io']"]
    assert http.peers[:2] == http.peers[2:]


def test_a_blocking_call_in_a_coroutine_does_not_wait_for_that_coroutines_loop(
    http: Service,
) -> None:
    out = http.run("""
        async def main():
            asyncio.get_running_loop().slow_callback_duration = 60  # -X dev would report it
            others = [asyncio.create_task(client.aembed([f"text {i}"])) for i in range(8)]
            await asyncio.sleep(0)
            print(right(9), any(task.done() for task in others))
            results = await asyncio.gather(*others)
            print(all(is_of(result.vectors[0], i) for i, result in enumerate(results)))
        asyncio.run(main())
    """)
    assert out == ["True False", "True"]


def test_sync_and_async_calls_may_be_nested(http: Service) -> None:
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


def test_concurrent_loops_of_many_threads_get_their_own_vectors(http: Service) -> None:
    out = http.run("""
        from concurrent.futures import ThreadPoolExecutor
        async def several(first):
            calls = [client.aembed([f"text {i}"]) for i in range(first, first + 4)]
            results = await asyncio.gather(*calls)
            return [is_of(result.vectors[0], first + i) for i, result in enumerate(results)]
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda i: asyncio.run(several(i % 16)), range(40)))
        print(all(map(all, results)), threads())
    """)
    assert out == ["True ['MainThread', 'kalm-io']"]


START = """
client = KalmClient(batch_size=1)
async def signalled():
    await asyncio.to_thread(sys.stdin.readline)
async def main():
"""
CANCELLED = {
    "a task": """
        task = asyncio.create_task(client.aembed(["never"]))
        await signalled()
        task.cancel()
        await asyncio.wait([task])
        print(task.cancelled())
    """,
    "a group": """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(client.aembed(["never"]))
                group.create_task(client.aembed(["never again"]))
                await signalled()
                raise KeyError
        except* KeyError as error:
            print(len(error.exceptions) == 1)
    """,
    "a timeout": """
        try:
            async with asyncio.timeout(None) as timer:
                waiting = asyncio.create_task(signalled())
                waiting.add_done_callback(lambda _: timer.reschedule(0))
                await client.aembed(["never"])
        except TimeoutError:
            print(True)
    """,
    "an iterator": """
        parts = client.aiter_embed(["text 0", "never"])
        print(is_of((await anext(parts)).vectors[0], 0))
        await signalled()
        await parts.aclose()
    """,
    "a loop": """
        task = asyncio.create_task(client.aembed(["never"]))
        await signalled()
        print(True)
    """,
}
END = """
asyncio.run(main())
sys.stdin.readline()
print(right(1))
"""


@pytest.mark.parametrize("what", CANCELLED)
def test_cancelling_a_call_cancels_its_requests(http: Service, what: str) -> None:
    body = indent(dedent(CANCELLED[what]), "    ")
    with http.start(START + body + END) as program:
        program.wait_until(lambda: "never" in http.waiting)
        program.tell()
        assert program.line() == "True"
        program.wait_until(lambda: not http.waiting)
        program.tell()
        assert program.finish() == ["True"]


def test_a_cancelled_wait_for_a_thread_mixes_up_no_vectors(http: Service) -> None:
    """The thread itself cannot be cancelled."""
    out = http.run("""
        async def main():
            task = asyncio.create_task(asyncio.to_thread(right, 0))
            await asyncio.sleep(0)
            task.cancel()
            return all(await asyncio.gather(*(asyncio.to_thread(right, i) for i in range(20))))
        print(asyncio.run(main()))
    """)
    assert out == ["True"]
