"""Goodput, latency, recovery and Retry-After of `kalm serve` under more load than it can serve.

    python benchmarks/service/overload.py                   # the embedded engine, about 8 minutes
    python benchmarks/service/overload.py --engine vllm     # a tiny model on this machine's CPU

Goodput counts answers with status 200 that arrive before their caller's deadline. A query and a
document request cost different amounts of time, so goodput is given as the share of the capacity
that the good answers stand for: queries/(queries a second at capacity) + the same for documents.
Best is the most that any run of this load has reached, closed loop included. Run it on a machine
that does nothing else: service and load generator share it.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from load import Caller, Choose, Kind, Outcome, Run, closed_loop, open_loop, percentile

ROOT = Path(__file__).resolve().parents[2]
KEY = "overload-benchmark"
CALLERS = 16
"""Of the closed loop that measures the capacity."""
WARM = 2.0
"""Seconds of each load that are not counted."""
PROMPT_FACTOR = 3.0
RECOVERY_WAIT = 30.0
QUERIES_PER_DOCUMENT = 10
"""Of the mixed load."""


@contextmanager
def served(engine: str, folder: Path) -> Iterator[tuple[str, int]]:
    """`kalm serve` in a process of its own; its host and port."""
    command = [sys.executable, "-m", "kalm_integrations.cli", "serve", "--port", "0"]
    command += ["--engine", engine]
    if engine == "vllm":
        sys.path.insert(0, str(ROOT / "tests/vllm"))
        from tiny_models import tiny_gemma3

        model = tiny_gemma3(folder / "tiny-gemma")
        command += ["--model", str(model), "--dtype", "fp32", "--enforce-eager"]
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    log = folder / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command,
            env={**os.environ, "KALM_API_KEY": KEY},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            cwd=ROOT,
        )
        try:
            while not (ready := re.search(r"on http://([\d.]+):(\d+)", log.read_text())):
                if process.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.1)
            yield ready[1], int(ready[2])
        finally:
            process.terminate()
            process.wait()
            print(f"log of the service: {log.stat().st_size:,} bytes", file=sys.stderr)


@dataclass
class Cell:
    """One row of the table."""

    load: str
    times: float
    deadline: float
    goodput: float
    queries: float
    documents: float
    p99: float
    refused: int
    late: int
    recovery: float
    ratio: float
    within: float
    first_retry: float
    lag: float


class Bench:
    """Runs against one service."""

    def __init__(self, host: str, port: int, seconds: float) -> None:
        self.address = host, port
        self.seconds = seconds
        self.alone: dict[Kind, float] = {}
        """Requests a second, and seconds of one on an idle service, of each kind alone."""
        self.idle: dict[Kind, float] = {}
        self.best: dict[str, float] = {}
        self.rates: dict[str, float] = {}

    def caller(self, seed: int) -> Caller:
        return Caller(*self.address, KEY, seed)

    def choose(self, load: str, caller: Caller) -> Choose:
        if load != "mixed":
            return lambda: load  # type: ignore[return-value]
        share = 1 / (QUERIES_PER_DOCUMENT + 1)
        return lambda: "document" if caller.random.random() < share else "query"

    def share(self, run: Run, skip: float = WARM) -> float:
        return sum(run.rate(kind, skip) / rate for kind, rate in self.alone.items())

    async def capacity(self) -> None:
        """Measure what each load reaches in a closed loop."""
        for load in ("query", "document", "mixed"):
            caller = self.caller(1)
            choose = self.choose(load, caller)
            run = await closed_loop(caller, choose, CALLERS, self.seconds)
            if load != "mixed":
                kind: Kind = load  # type: ignore[assignment]
                self.alone[kind] = run.rate(kind, WARM)
                times = [(await caller.send(kind, 60)).seconds for _ in range(20)]
                self.idle[kind] = percentile(times, 0.5)
            self.rates[load] = run.rate("query", WARM) + run.rate("document", WARM)
            self.best[load] = self.share(run) if load == "mixed" else 1.0
            caller.close()
            print(
                f"capacity, {load}: {self.rates[load]:.1f} requests/s, {self.best[load]:.2f}",
                flush=True,
            )

    async def cell(self, load: str, times: float, deadline: float) -> Cell:
        """Overload the service, then watch it recover."""
        caller, retrier = self.caller(2), self.caller(3)
        samples: list[tuple[float, float, int]] = []
        sampling = 0
        seen = 0

        async def sample(refused: Outcome) -> None:
            """Retry a few of the refused until one succeeds: half when told, half by polling."""
            nonlocal sampling, seen
            seen += 1
            told = refused.retry_after
            if told is None or told > deadline or sampling >= 4 or seen % 10:
                return
            sampling += 1
            obedient, tries = len(samples) % 2 == 0, 0
            try:
                while time.monotonic() < refused.ended + 4 * told + 1:
                    await asyncio.sleep(told if obedient else max(told / 8, 0.02))
                    begin = time.monotonic()
                    again = await retrier.send(refused.kind, deadline)
                    tries += 1
                    if again.status == 200:
                        samples.append((told, begin - refused.ended, tries if obedient else 0))
                        return
                    if obedient and again.retry_after is not None:
                        told_again = again.retry_after
                        await asyncio.sleep(max(0.0, told_again - told))
                samples.append((told, math.inf, tries if obedient else 0))
            finally:
                sampling -= 1

        run = await open_loop(
            caller,
            self.choose(load, caller),
            rate=times * self.rates[load],
            seconds=self.seconds,
            deadline=deadline,
            on_refusal=sample,
        )
        recovery = await self.recovery(retrier, run, deadline)
        await asyncio.wait(waiting, timeout=deadline + 5) if (waiting := run.waiting) else None  # type: ignore[attr-defined]
        goodput = self.share(run)
        self.best[load] = max(self.best[load], goodput)
        done = [each.seconds for each in run.outcomes if each.status == 200]
        queries = [x.seconds for x in run.outcomes if x.status == 200 and x.kind == "query"]
        ratios = [told / truth for told, truth, _ in samples]
        obeyed = [tries for _, _, tries in samples if tries]
        caller.close()
        retrier.close()
        del done
        return Cell(
            load,
            times,
            deadline,
            goodput,
            run.rate("query", WARM),
            run.rate("document", WARM),
            percentile(queries, 0.99),
            sum(each.status == 503 for each in run.outcomes),
            sum(each.status not in (200, 503) for each in run.outcomes),
            recovery,
            percentile(ratios, 0.5),
            sum(0.5 <= ratio <= 2 for ratio in ratios) / max(1, len(ratios)),
            sum(tries == 1 for tries in obeyed) / max(1, len(obeyed)),
            run.late,
        )

    async def recovery(self, caller: Caller, run: Run, deadline: float) -> float:
        """Seconds from the load's end until new queries are answered as on an idle service."""
        prompt = max(0.1, PROMPT_FACTOR * self.idle["query"])
        while time.monotonic() < run.end + RECOVERY_WAIT:
            begin = time.monotonic()
            outcome = await caller.send("query", min(deadline, 5.0))
            # A document's piece may be running.
            if outcome.status == 200 and outcome.seconds <= prompt + self.idle["document"]:
                return begin - run.end
            await asyncio.sleep(0.05)
        return math.inf


async def measure(options: argparse.Namespace, host: str, port: int) -> list[Cell]:
    bench = Bench(host, port, options.seconds)
    await bench.capacity()
    cells = []
    for load in options.loads:
        for deadline in options.deadlines:
            for times in options.times:
                cell = await bench.cell(load, times, deadline)
                cells.append(cell)
                print(row(cell, bench), flush=True)
    print("\n" + HEAD)
    for cell in cells:
        print(row(cell, bench))
    return cells


HEAD = (
    "| load | times capacity | deadline | goodput of best | queries/s | documents/s | p99 of queries "
    "| refused | unanswered | recovery | told/true Retry-After | within 2x | first retry succeeds "
    "| generator lag |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(cell: Cell, bench: Bench) -> str:
    return (
        f"| {cell.load} | {cell.times:g} | {cell.deadline:g} s "
        f"| {cell.goodput / bench.best[cell.load]:.0%} | {cell.queries:.0f} "
        f"| {cell.documents:.1f} | {cell.p99:.2f} s | {cell.refused} | {cell.late} "
        f"| {cell.recovery:.1f} s | {cell.ratio:.2f} | {cell.within:.0%} | {cell.first_retry:.0%} "
        f"| {cell.lag:.2f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=["embedded", "vllm"], default="embedded")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load")
    parser.add_argument("--times", type=float, nargs="+", default=[2.0, 5.0])
    parser.add_argument("--deadlines", type=float, nargs="+", default=[1.0, 5.0, 120.0])
    parser.add_argument("--loads", nargs="+", default=["query", "mixed"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, served(options.engine, Path(folder)) as address:
        asyncio.run(measure(options, *address))


if __name__ == "__main__":
    main()
