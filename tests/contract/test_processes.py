"""Threads, forks, spawns, signals, interpreter exit: each with a real process.

A hang is a failure: every script has a time limit.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

PREAMBLE = """
import asyncio, multiprocessing, os, signal, sys, threading, time
from kalm_integrations import KalmClient
client = KalmClient(backend="local")
def embed(text):
    return client.embed([text]).vectors[0].tolist()
"""


def run(code: str, *, timeout: float = 60) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PREAMBLE + code],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_a_forked_child_gets_connections_of_its_own() -> None:
    out = run(
        "before = embed('x')\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    same = embed('x') == before\n"
        "    print('child', same, [t.name for t in threading.enumerate()], flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "print('parent', embed('x') == before)"
    )
    child, parent = out.splitlines()
    assert child.startswith("child True ['MainThread', 'kalm-io'")
    assert parent == "parent True"


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_worker_processes(method: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    script = tmp_path / "script.py"
    script.write_text(
        PREAMBLE + "if __name__ == '__main__':\n"
        f"    context = multiprocessing.get_context({method!r})\n"
        "    here = embed('text 1')\n"
        "    with context.Pool(2) as pool:\n"
        "        there = pool.map(embed, ['text 0', 'text 1', 'text 2'], chunksize=1)\n"
        "    print(there[1] == here, len(there))\n"
    )
    done = subprocess.run(
        [sys.executable, script], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "True 3\n", done.stderr


def test_two_event_loops_and_blocking_calls_in_between() -> None:
    out = run(
        "async def main():\n"
        "    return (await client.aembed(['x'])).vectors[0].tolist() == embed('x')\n"
        "print(asyncio.run(main()), embed('x') is not None, asyncio.run(main()))\n"
        "print([t.name for t in threading.enumerate() if t.name.startswith('kalm-io')])"
    )
    assert out.splitlines() == ["True True True", "['kalm-io']"]


def test_ctrl_c_ends_a_long_call_at_once() -> None:
    code = (
        PREAMBLE + "client.warm_up()\nprint('ready', flush=True)\n"
        "try:\n"
        "    client.embed([f'{i} ' * 500 for i in range(50_000)])\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', len(embed('still works')))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(1)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (out, err, process.returncode) == ("interrupted 512\n", "", 0)
        assert time.monotonic() - sent < 10


def test_a_thread_goes_on_when_the_main_one_has_ended() -> None:
    out = run(
        "def work():\n"
        "    time.sleep(0.5)\n"
        "    for i in range(20): embed(f'text {i}')\n"
        "    print('done')\n"
        "threading.Thread(target=work).start()"
    )
    assert out == "done\n"


@pytest.mark.parametrize(
    "start",
    [
        "threading.Thread(target=client.embed, args=(TEXTS,), daemon=True).start()",
        "next(parts := client.iter_embed(TEXTS))",
    ],
    ids=["a thread waits", "an iterator is open"],
)
def test_the_interpreter_exits_with_calls_in_flight(start: str) -> None:
    began = time.monotonic()
    out = run(
        "TEXTS = [f'{i} ' * 300 for i in range(50_000)]\n"
        f"client.warm_up()\n{start}\ntime.sleep(0.5)\nprint('bye')",
        timeout=30,
    )
    assert out == "bye\n"
    assert time.monotonic() - began < 20
