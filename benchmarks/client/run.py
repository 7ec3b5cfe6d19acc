"""Every client against one server that answers at once: wall time, processor time, memory.

    python benchmarks/client/run.py          # some 15 minutes; a Markdown report on stdout

Each measurement is a process of its own (`measure.py`); the clients take turns within a round, so
that whatever else the machine does hits all of them alike; given are medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clients import BATCH, CLIENTS, CONCURRENCY, FLOOR, PACKAGES

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
PORTS = {0: 8410, 50: 8411, 200: 8412}
"""By the server's latency in milliseconds."""
MANY, FEW, QUERIES = 10_000, 2_000, 500
TABLES = ("many", "late", "queries")
TO_NUMPY = [name for name in CLIENTS if "bytes" in name or name.startswith(("KalmClient", "raw"))]
LANGCHAIN, OPENAI = "KalmModalEmbeddings, LangChain", "LangChain OpenAIEmbeddings"
LATE = [name for name in CLIENTS if "bytes" not in name and not name.startswith(("raw", "urllib"))]


@contextmanager
def servers() -> Iterator[None]:
    """One for each latency."""
    started = [
        subprocess.Popen([sys.executable, HERE / "server.py", str(port), str(latency)])
        for latency, port in PORTS.items()
    ]
    try:
        for port in PORTS.values():
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.1)
        yield
    finally:
        for server in started:
            server.kill()
            server.wait()


def measured(work: str, name: str, latency: int, number: int) -> Any:
    """What `measure.py` says of it."""
    url = f"http://127.0.0.1:{PORTS[latency]}"
    command = [sys.executable, HERE / "measure.py", work, name, url, str(number)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def median(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure(rounds: int, tables: Sequence[str]) -> dict[str, Any]:
    """The figures of some tables."""
    many, late, queries = defaultdict(list), defaultdict(list), defaultdict(list)
    for turn in range(rounds):
        for name in CLIENTS:
            print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr)
            if "many" in tables and (name != "urllib3 and json" or turn == 0):  # takes minutes
                many[name].append(measured("many", name, 0, MANY))
            for latency in (50, 200):
                if "late" in tables and name in LATE and turn < 3:
                    late[f"{latency} {name}"].append(measured("many", name, latency, FEW))
            if "queries" in tables and ("float32" not in name or name == FLOOR):
                queries[name].append(measured("queries", name, 0, QUERIES))
    found = {
        "many": {name: median(rows) for name, rows in many.items()},
        "late": {name: median(rows) for name, rows in late.items()},
        "queries": {
            name: {
                kind: {
                    "p50": statistics.median(percentile(row[kind], 0.5) for row in rows),
                    "p99": statistics.median(percentile(row[kind], 0.99) for row in rows),
                }
                for kind in ("client", "bare")
            }
            for name, rows in queries.items()
        },
    }
    return {
        **{table: found[table] for table in tables},
        "rounds": rounds,
        "machine": f"Python {platform.python_version()}, {platform.machine()} "
        f"{platform.system()}, {os.cpu_count()} cores",
        "versions": {package: version(package) for package in PACKAGES},
    }


def report(results: dict[str, Any]) -> Iterator[str]:
    """The tables, in Markdown."""
    many, late, queries = results["many"], results["late"], results["queries"]
    floor, peer = many[FLOOR]["wall"], many[OPENAI]["wall"]
    yield f"{MANY:,} texts in requests of {BATCH}, no latency:\n"
    yield "| client | result | wall, s | floor × | CPU, ms per 1,000 | MB |"
    yield "|---|---|---|---|---|---|"
    for name, row in many.items():
        kind = "numpy" if name in TO_NUMPY or name == "baseten-performance-client" else "lists"
        cpu = 1e6 * row["cpu"] / MANY
        yield (
            f"| {name} | {kind} | {row['wall']:.2f} | {row['wall'] / floor:.1f} | {cpu:.0f} "
            f"| {row['mb']:.0f} |"
        )
    yield f"\n{FEW:,} texts, answers after 50 or 200 ms (ours: {CONCURRENCY} requests at a time):\n"
    yield "| client | 50 ms: s | 200 ms: s |"
    yield "|---|---|---|"
    for name in LATE:
        yield f"| {name} | {late[f'50 {name}']['wall']:.2f} | {late[f'200 {name}']['wall']:.2f} |"
    waves = -(-FEW // (BATCH * CONCURRENCY))
    yield f"| ideal: {waves} waves | {0.05 * waves:.2f} | {0.2 * waves:.2f} |"
    yield f"\nOne query after the other, {QUERIES} of them, ms:\n"
    yield "| client | p50 | p99 | × aiohttp's bare call of our request |"
    yield "|---|---|---|---|"
    for name, row in queries.items():
        client, bare = row["client"], row["bare"]
        yield (
            f"| {name} | {client['p50']:.2f} | {client['p99']:.2f} "
            f"| {client['p50'] / bare['p50']:.2f} |"
        )
    yield "\nRatios:\n"
    for name in many:
        if name.startswith("Kalm") and name not in TO_NUMPY:
            row = many[name]
            yield (
                f"- {name}: {peer / row['wall']:.1f} times as fast as {OPENAI}, "
                f"{row['mb'] / many[OPENAI]['mb']:.2f} of its memory"
            )
    baseten = many["baseten-performance-client"]["wall"]
    for name in ("KalmClient", "KalmClient, float32"):
        yield f"- {name}: {baseten / many[name]['wall']:.1f} times as fast as baseten's, to numpy"
    packages = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    yield (
        f"\nMedians of {results['rounds']} interleaved rounds; {results['machine']}; {packages}."
    )


def main() -> None:
    """Measure, keep the figures, print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="print the report of the last run")
    parser.add_argument("--only", choices=TABLES, help="one table; the others stay as they were")
    asked = parser.parse_args()
    if not asked.again:
        with servers():
            results = measure(asked.rounds, [asked.only] if asked.only else TABLES)
        kept = json.loads(RESULTS.read_text()) if asked.only else {}
        RESULTS.write_text(json.dumps(kept | results, indent=1) + "\n")
    print("\n".join(report(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main()
