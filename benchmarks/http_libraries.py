"""Which HTTP library the client is built on: many wide answers, and single small ones.

    python benchmarks/http_libraries.py         # prints a Markdown table

One instant server in a process of its own, the rounds interleaved, medians. "157 wide answers" are
10,000 float32 vectors of 3,840 dimensions in requests of 64, 16 at a time; "one query" is one
answer of 7,680 bytes after the other.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from importlib.metadata import version

import aiohttp
import httpx2

PORT = 8399
URL = f"http://127.0.0.1:{PORT}"
ANSWERS = {b"/many": bytes(64 * 3840 * 4), b"/one": bytes(7680)}
ROUNDS, REQUESTS, CONCURRENCY, QUERIES = 7, 157, 16, 300
Post = Callable[[str, bytes], Awaitable[bytes]]


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer what comes on one connection, at once."""
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            break
        length = next(line for line in head.lower().split(b"\r\n") if b"content-length" in line)
        await reader.readexactly(int(length.partition(b":")[2]))
        body = ANSWERS[head.split(b" ")[1]]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
    writer.close()


def serve() -> None:
    """The server's process."""

    async def forever() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", PORT)
        await server.serve_forever()

    asyncio.run(forever())


async def many(post: Post) -> float:
    """Seconds for all wide answers."""
    slots = asyncio.Semaphore(CONCURRENCY)

    async def one() -> None:
        async with slots:
            await post("/many", bytes(20_000))

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(REQUESTS)))
    return time.perf_counter() - start


async def query(post: Post) -> float:
    """Median milliseconds of one small answer."""
    times = []
    for _ in range(QUERIES):
        start = time.perf_counter()
        await post("/one", bytes(100))
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


async def measure() -> dict[str, tuple[float, float]]:
    """(seconds, milliseconds) by library."""
    results: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    async with (
        aiohttp.ClientSession(auto_decompress=False) as by_aiohttp,
        httpx2.AsyncClient(timeout=60, trust_env=False) as by_httpx2,
    ):

        async def with_aiohttp(path: str, body: bytes) -> bytes:
            async with by_aiohttp.post(URL + path, data=body) as response:
                return await response.read()

        async def with_httpx2(path: str, body: bytes) -> bytes:
            return (await by_httpx2.post(URL + path, content=body)).content

        libraries: dict[str, Post] = {"aiohttp": with_aiohttp, "httpx2": with_httpx2}
        for _ in range(ROUNDS):
            for name, post in libraries.items():
                results[name].append((await many(post), await query(post)))
    return {
        name: (statistics.median(s for s, _ in rounds), statistics.median(m for _, m in rounds))
        for name, rounds in results.items()
    }


def main() -> None:
    """Measure, and print the table."""
    server = multiprocessing.Process(target=serve, daemon=True)
    server.start()
    time.sleep(1)
    results = asyncio.run(measure())
    server.terminate()
    print("| library | 157 wide answers, s | one query, ms |")
    print("|---|---|---|")
    for name, (seconds, milliseconds) in results.items():
        print(f"| {name} {version(name)} | {seconds:.2f} | {milliseconds:.2f} |")
    machine = f"Python {platform.python_version()}, {platform.machine()} {platform.system()}"
    print(f"\nMedian of {ROUNDS} interleaved rounds on loopback; {machine}.")


if __name__ == "__main__":
    main()
