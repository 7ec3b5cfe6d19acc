"""One client in a process of its own: python measure.py NAME URL TEXTS → one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from clients import BATCH, CLIENTS, aiohttp_query
from server import rows


def memory(kind: str) -> float:
    """MB that the process has ("VmRSS"), or had at most ("VmHWM")."""
    status = Path("/proc/self/status").read_text().split(f"{kind}:")[1]
    return int(status.split()[0]) / 1000


def check(vectors: Any, texts: int) -> None:
    """Every row is that of its text."""
    assert len(vectors) == texts
    for row in (0, 1, BATCH - 1, BATCH, texts - 1):
        expected = rows()[row % BATCH]
        assert np.allclose(vectors[row], expected, atol=1e-6, rtol=0), row


def many(name: str, url: str, texts: int) -> dict[str, float]:
    """Seconds, processor seconds and growth in MB of embedding so many texts."""
    embed, _ = CLIENTS[name](url)
    embed([f"warm {i}" for i in range(4 * BATCH)])
    given = [f"a short text, number {i}" for i in range(texts)]
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    cpu, start = time.process_time(), time.perf_counter()
    vectors = embed(given)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    grown = memory("VmHWM") - before
    check(vectors, texts)
    return {"wall": wall, "cpu": cpu, "mb": grown}


def queries(name: str, url: str, number: int) -> dict[str, list[float]]:
    """Milliseconds of each of so many queries, and of aiohttp's own calls between them: with the
    request that our client makes, whose answer they only receive."""
    _, embed = CLIENTS[name](url)
    bare = aiohttp_query(url)
    times: dict[str, list[float]] = {"client": [], "bare": []}
    for turn in range(number // 25 + 1):  # the first warms up
        for kind, one in (("bare", bare), ("client", embed)):
            for i in range(25):
                start = time.perf_counter()
                vector = one(f"query {turn} {i}")
                if turn:
                    times[kind].append(1000 * (time.perf_counter() - start))
        assert np.allclose(vector, rows()[0], atol=1e-6, rtol=0)
    return times


if __name__ == "__main__":
    work, name, url, number = sys.argv[1:]
    print(json.dumps({"many": many, "queries": queries}[work](name, url, int(number))))
