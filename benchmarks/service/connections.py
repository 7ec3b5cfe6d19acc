"""Load on `kalm serve` that consists of connections: idle ones, slow ones, too many of them.

    python benchmarks/service/connections.py           # Linux; two minutes
    python benchmarks/service/connections.py --speed   # processor time of a query, by HTTP server

Each row of the first table starts `kalm serve` with the embedded engine and a limit of its own for
open files, opens connections without a key, and sends queries with the key, each on a new
connection. "reconnecting" opens a connection again half a second after the server has closed it.
Then many queries are sent at a time. The last line says whether all targets were met.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Process
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from kalm_integrations.codec import MEDIA_TYPE

KEY = "benchmark"
SECONDS = 15
BODY = json.dumps({"input": "How tall is K2?", "input_type": "query"}).encode()
QUERY = (
    b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
) % (KEY.encode(), len(BODY), BODY)
LONGEST_QUERY, MOST_LOG = 1.0, 10_000


@dataclass
class Served:
    """A running `kalm serve`."""

    pid: int
    port: int
    log: Path

    def cpu(self) -> float:
        """Processor seconds so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(files: int) -> Iterator[Served]:
    """`kalm serve` that may open so many files."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [
                    "bash", "-c", f'ulimit -n {files}; exec "$@"', "-",
                    sys.executable, "-m", "kalm_integrations.cli", "serve", "--port", "0",
                ],
                stdout=output,
                stderr=output,
                env={**os.environ, "KALM_API_KEY": KEY},
            )  # fmt: skip
        try:
            while " on http://" not in log.read_text():
                if process.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.1)
            port = int(log.read_text().split(" on http://")[1].split()[0].rpartition(":")[2])
            yield Served(process.pid, port, log)
        finally:
            process.terminate()
            process.wait()


async def query(port: int) -> int:
    """The status of one query on a new connection; 0 if the connection broke."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return 0
    try:
        writer.write(QUERY)
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split()[1])
        if status == 503 and b"retry-after:" not in head.lower():
            return 0
        return status
    except (OSError, asyncio.IncompleteReadError):
        return 0
    finally:
        writer.close()


async def hold(port: int, sent: bytes, reconnect: bool) -> None:
    """A connection that sends `sent` and no more."""
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(sent)
                await reader.read()
            finally:
                writer.close()
        if not reconnect:
            return
        await asyncio.sleep(0.5)


async def attack(port: int, number: int, sent: bytes, reconnect: bool) -> None:
    """Hold `number` connections, in a process of its own, until it is killed."""
    await asyncio.gather(*(hold(port, sent, reconnect) for _ in range(number)))
    await asyncio.Event().wait()


def run_attack(*arguments: Any) -> None:
    """Run `attack`."""
    asyncio.run(attack(*arguments))


async def ask(served: Served) -> dict[str, Any]:
    """Time queries while others hold connections."""
    start, cpu, size = time.perf_counter(), served.cpu(), served.log.stat().st_size
    times, statuses = [], Counter[int]()
    while time.perf_counter() - start < SECONDS:
        before = time.perf_counter()
        statuses[await query(served.port)] += 1
        times.append(time.perf_counter() - before)
        await asyncio.sleep(0.1)
    seconds = time.perf_counter() - start
    grown = (served.log.stat().st_size - size) / seconds
    used = (served.cpu() - cpu) / seconds
    return {"times": times, "statuses": statuses, "log": grown, "cpu": used}


async def many(served: Served, number: int) -> tuple[Counter[int], float]:
    """Statuses of so many queries at a time, and seconds until all are answered."""
    start = time.perf_counter()
    statuses = await asyncio.gather(*(query(served.port) for _ in range(number)))
    return Counter(statuses), time.perf_counter() - start


def connections() -> bool:
    """Print the tables; whether all targets are met."""
    met = True
    print("| connections without a key | open files | queries | slowest, ms | median, ms "
          "| log, kB/s | server's CPU |\n|---|---|---|---|---|---|---|")  # fmt: skip
    header = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nX-Slow: "
    for name, number, files, sent, reconnect in (
        ("1,000 idle", 1_000, 256, b"", False),
        ("1,000 idle, reconnecting", 1_000, 256, b"", True),
        ("1,000 in the middle of a header, reconnecting", 1_000, 256, header, True),
        ("1,100 idle", 1_100, 1_024, b"", False),
    ):
        with serving(files) as served:
            attacker = Process(target=run_attack, args=(served.port, number, sent, reconnect))
            attacker.start()
            try:
                result = asyncio.run(ask(served))
            finally:
                attacker.kill()
                attacker.join()
        times, statuses = result["times"], result["statuses"]
        met &= set(statuses) == {200} and max(times) < LONGEST_QUERY and result["log"] < MOST_LOG
        print(
            f"| {name} | {files} | {dict(statuses)} | {1000 * max(times):.0f} "
            f"| {1000 * statistics.median(times):.0f} | {result['log'] / 1000:.1f} "
            f"| {100 * result['cpu']:.0f} % |",
            flush=True,
        )
    print(
        "\n| queries at a time | open files | statuses | seconds | log, kB |\n|---|---|---|---|---|"
    )
    with serving(1_024) as served:
        size = served.log.stat().st_size
        statuses, seconds = asyncio.run(many(served, 1_300))
        size = served.log.stat().st_size - size
    met &= set(statuses) <= {200, 503}
    print(f"| 1,300 | 1,024 | {dict(statuses)} | {seconds:.1f} | {size / 1000:.0f} |")
    return met


# --- processor time of a query


def serve_instant(server: str, port: int) -> None:
    """An engine that costs nothing, behind one of the servers of `speed`."""
    import uvicorn
    from instant import InstantEngine

    from modal_backend.http.app import create_app
    from modal_backend.http.auth import BearerKeys
    from modal_backend.http.server import HttpServer, bind
    from modal_backend.service import EmbeddingService

    app = create_app(EmbeddingService(InstantEngine()), keys=BearerKeys([SecretStr(KEY)]))
    quiet: dict[str, Any] = {"log_level": "error", "access_log": False}
    if server == "kalm serve":
        asyncio.run(HttpServer(app, bind("127.0.0.1", port), **quiet).serve())
    else:
        asyncio.run(uvicorn.Server(uvicorn.Config(app, port=port, http=server, **quiet)).serve())


def cpu_of_queries(port: int, pid: int, number: int) -> float:
    """Microseconds of the server's processor time for one query on a kept connection."""
    served = Served(pid, port, Path())
    connection = http.client.HTTPConnection("127.0.0.1", port)
    fields = {"Authorization": f"Bearer {KEY}", "Accept": MEDIA_TYPE}

    def one() -> None:
        connection.request("POST", "/v1/embeddings", BODY, fields)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()

    while True:
        try:
            one()
            break
        except OSError:
            connection.close()
            time.sleep(0.1)
    before = served.cpu()
    for _ in range(number):
        one()
    return 1e6 * (served.cpu() - before) / number


def speed() -> None:
    """Print the table. Processor time, because a busy machine changes it least."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "client"))
    servers = ("h11", "httptools", "kalm serve")
    result: dict[str, list[float]] = {server: [] for server in servers}
    for round_ in range(5):
        for i, server in enumerate(servers):
            port = 8_450 + i
            process = Process(target=serve_instant, args=(server, port))
            process.start()
            try:
                assert process.pid is not None
                cpu = cpu_of_queries(port, process.pid, 2_000)
                if round_:
                    result[server].append(cpu)
            finally:
                process.kill()
                process.join()
    print("| server | CPU of a query, µs |\n|---|---|")
    for server, figures in result.items():
        print(f"| {server} | {statistics.median(figures):.0f} |")


def main() -> None:
    """Run the chosen measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speed", action="store_true")
    if parser.parse_args().speed:
        speed()
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    met = connections()
    print("\nall targets met" if met else "\nA TARGET WAS MISSED")
    sys.exit(not met)


if __name__ == "__main__":
    main()
