"""The I/O thread: one a process, for callers of every kind, gone with the process."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextvars import ContextVar
from textwrap import dedent

import pytest

from kalm_integrations.event_loop import BackgroundLoop, background_loop

pytestmark = pytest.mark.slow

request_id = ContextVar("request_id", default="none")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture
def thread():
    """A thread of the test's own, that it may stop."""
    thread = BackgroundLoop()
    thread.start()
    yield thread
    thread.stop()


async def here() -> tuple[threading.Thread, asyncio.AbstractEventLoop]:
    return threading.current_thread(), asyncio.get_running_loop()


def script(source: str, limit: float = 20) -> str:
    """What a fresh interpreter that runs `source` prints; it must end well and in time."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", dedent(source)],
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_calls_from_any_thread_and_any_loop_run_on_one_thread_and_one_loop():
    async def from_a_loop():
        return await asyncio.wrap_future(background_loop().submit(here()))

    def from_a_thread(_):
        return background_loop().submit(here()).result()

    with ThreadPoolExecutor(8) as pool:
        homes = {*pool.map(from_a_thread, range(32)), asyncio.run(from_a_loop())}
    homes |= {asyncio.run(from_a_loop()), from_a_thread(0)}
    ((home, loop),) = homes
    assert home.daemon
    assert home.name == "kalm-io"
    assert home is not threading.current_thread()
    assert loop is background_loop().loop


def test_concurrent_first_calls_start_one_thread():
    out = script("""
        import sys, threading
        from kalm_integrations.event_loop import background_loop
        sys.setswitchinterval(1e-6)
        start, found = threading.Barrier(16), []
        def first():
            start.wait()
            found.append(background_loop())
        threads = [threading.Thread(target=first) for _ in range(16)]
        for each in threads: each.start()
        for each in threads: each.join()
        print(len(found), len(set(found)), threading.active_count())
    """)
    assert out == "16 1 2\n"


def test_results_and_exceptions_reach_the_caller(thread):
    async def fail():
        raise KeyError("theirs")

    assert thread.submit(asyncio.sleep(0, "result")).result() == "result"
    with pytest.raises(KeyError, match="theirs"):
        thread.submit(fail()).result()


def test_calls_run_concurrently(thread):
    slow = thread.submit(asyncio.sleep(60))
    assert thread.submit(asyncio.sleep(0, "quick")).result(timeout=5) == "quick"
    assert not slow.done()


def test_the_coroutine_runs_in_a_copy_of_the_callers_context(thread):
    async def read_and_change():
        seen = request_id.get()
        request_id.set("changed")
        return seen

    token = request_id.set("42")
    try:
        assert thread.submit(read_and_change()).result() == "42"
        assert request_id.get() == "42"
    finally:
        request_id.reset(token)
    assert thread.submit(read_and_change()).result() == "none"


def test_a_blocking_call_on_the_thread_itself_raises_an_error(thread):
    async def call_back():
        thread.submit(asyncio.sleep(0)).result(timeout=5)

    with pytest.raises(RuntimeError, match="background thread would never return"):
        thread.submit(call_back()).result(timeout=10)


def test_cancelling_the_future_cancels_the_coroutine(thread):
    begun, unwound = threading.Event(), threading.Event()

    async def work():
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            unwound.set()

    future = thread.submit(work())
    assert begun.wait(60)
    assert future.cancel()
    assert unwound.wait(60)
    with pytest.raises(CancelledError):
        future.result()


def test_a_call_that_is_cancelled_before_it_starts_does_nothing(thread):
    begun = threading.Event()

    async def work():
        begun.set()

    async def hold_up():
        held_up.set()
        assert submitted.wait(60)  # blocks the loop: what comes now has to wait

    held_up, submitted = threading.Event(), threading.Event()
    holding = thread.submit(hold_up())
    assert held_up.wait(60)
    future = thread.submit(work())
    assert future.cancel()
    submitted.set()
    holding.result(timeout=5)
    assert thread.submit(asyncio.sleep(0, "next")).result(timeout=5) == "next"
    assert not begun.is_set()


def test_a_failure_creates_no_reference_cycle(thread):
    async def fail():
        raise KeyError("theirs")

    gc.disable()
    try:
        future = thread.submit(fail())
        with pytest.raises(KeyError):
            future.result(timeout=5)
        gone = weakref.ref(future)
        del future
        assert gone() is None  # no cycle through the exception's frames
    finally:
        gc.enable()


def test_stopping_cancels_running_calls_and_ends_the_thread():
    thread, unwound = BackgroundLoop(), []
    thread.start()

    async def work(begun):
        try:
            begun.set()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)  # clean-up may wait
            unwound.append(threading.current_thread())

    begun = threading.Event()
    future = thread.submit(work(begun))
    home = thread.submit(here()).result()[0]
    assert begun.wait(60)
    thread.stop()
    assert unwound == [home]
    assert not home.is_alive()
    assert thread.loop.is_closed()
    with pytest.raises(CancelledError):
        future.result(timeout=5)


def test_stopping_closes_unfinished_generators():
    thread, closed = BackgroundLoop(), []
    thread.start()
    kept = []

    async def generate():
        try:
            yield 1
        finally:
            closed.append(True)

    async def begin():
        kept.append(generate())
        return await anext(kept[0])

    assert thread.submit(begin()).result() == 1
    thread.stop()
    assert closed == [True]


def test_stopping_twice_is_allowed(thread):
    thread.stop()
    thread.stop()
    assert thread.loop.is_closed()


def test_importing_and_constructing_start_no_thread():
    out = script("""
        import threading
        from kalm_integrations import KalmClient
        from kalm_integrations.transports.base import open_transport
        client = KalmClient(backend="local")
        open_transport(client.config)
        print(threading.active_count(), client.vector_identity.dimensions)
    """)
    assert out == "1 512\n"


def test_a_process_exits_promptly_and_cancels_running_calls():
    out = script("""
        import asyncio
        from kalm_integrations import event_loop
        event_loop._STOP_TIMEOUT = 60  # longer than this script may take
        async def work():
            print("at work", flush=True)
            try:
                await asyncio.sleep(3600)
            finally:
                print("unwound", flush=True)
        event_loop.background_loop().submit(work())
        event_loop.background_loop().submit(asyncio.sleep(0)).result()
    """)
    assert out == "at work\nunwound\n"


def test_a_call_that_ignores_cancellation_delays_the_exit_only_by_the_stop_timeout():
    out = script("""
        import asyncio, time
        from kalm_integrations import event_loop
        event_loop._STOP_TIMEOUT = 0.2
        async def stubborn():
            while True:
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    print("no", flush=True)
        event_loop.background_loop().submit(stubborn())
        event_loop.background_loop().submit(asyncio.sleep(0)).result()
    """)
    assert out == "no\n"


@needs_fork
def test_a_forked_child_starts_its_own_thread_and_the_parent_keeps_its_thread():
    out = script("""
        import asyncio, os, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: the very case
        from kalm_integrations import event_loop
        io = event_loop.background_loop
        def answer():
            return io().submit(asyncio.sleep(0, "answer")).result(timeout=5)
        answer()
        parents = io()
        with event_loop._lock:  # held by whoever is just starting the thread
            child = os.fork()
            if child == 0:
                print("child", answer(), io() is parents, parents.loop.is_closed(), flush=True)
                os._exit(0)
        os.waitpid(child, 0)
        print("parent", answer(), io() is parents)
    """)
    assert out == "child answer False False\nparent answer True\n"


@needs_fork
def test_the_exit_of_a_forked_child_does_not_affect_the_parents_loop():
    out = script("""
        import asyncio, gc, os, sys, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        from kalm_integrations.event_loop import background_loop
        background_loop().submit(asyncio.sleep(0)).result()
        child = os.fork()
        if child == 0:
            gc.collect()
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(background_loop().submit(asyncio.sleep(0.01, "answer")).result(timeout=5))
    """)
    assert out == "answer\n"
