"""Goodput, latency, recovery and Retry-After of `kalm serve` under more load than it can serve.

    python benchmarks/service/overload.py                   # the embedded engine, some 6 minutes
    python benchmarks/service/overload.py --engine vllm     # a tiny model, with vLLM on the CPU

Goodput counts answers with status 200 that arrive before their caller's deadline. A query and a
document request cost different amounts of time, so goodput is given as the share of the capacity
that the good answers stand for: queries / (queries a second at capacity) + the same for documents.
The capacity is measured by 16 callers in a closed loop, that of each load before it is exceeded
and once more after it; best is the greater one of their mean and of what the overloaded service
reached. Run it on a machine that does nothing else: the service and the load generator share it.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from load import Caller, Choose, Kind, Outcome, Run, closed_loop, open_loop, percentile

ROOT = Path(__file__).resolve().parents[2]
KEY = "overload-benchmark"
CALLERS = 16
WARM = 2.0
"""Seconds of each load that are not counted."""
QUERIES_PER_DOCUMENT = 10
"""Of the mixed load."""
RECOVERY_LIMIT = 30.0


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
            stdout=stderr,
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
            print(f"The service logged {log.stat().st_size:,} bytes.")


@dataclass
class Retries:
    """Samples refused requests: half are retried when they were told to, half all the time."""

    caller: Caller
    deadline: float
    ratios: list[float] = field(default_factory=list)
    """Retry-After divided by the time after which a retry was answered with 200."""
    first: list[bool] = field(default_factory=list)
    """Whether the retry after Retry-After was."""
    answered: list[Outcome] = field(default_factory=list)
    """Retries answered with 200: they are part of the goodput."""
    _busy: int = 0
    _polling: bool = True

    async def sample(self, refused: Outcome) -> None:
        """Retry `refused`, unless some are being retried."""
        retry_after = refused.retry_after
        if self._busy == 4 or retry_after is None or retry_after > self.deadline:
            return
        self._busy += 1
        self._polling = polling = not self._polling
        try:
            if not polling:
                await asyncio.sleep(retry_after)
                again = await self._retry(refused)
                self.first.append(again.status == 200)
                return
            again = refused
            while again.status != 200 and again.sent < refused.ended + 4 * retry_after + 2:
                await asyncio.sleep(max(retry_after / 8, 0.04))
                again = await self._retry(refused)
            self.ratios.append(
                retry_after / (again.sent - refused.ended) if again.status == 200 else 0
            )
        finally:
            self._busy -= 1

    async def _retry(self, refused: Outcome) -> Outcome:
        outcome = await self.caller.send(refused.kind, self.deadline)
        if outcome.status == 200:
            self.answered.append(outcome)
        return outcome


Column = tuple[str, Callable[["Cell"], str]]


@dataclass
class Cell:
    """One row of the table."""

    load: str
    times: float
    deadline: float
    best: float
    goodput: float
    run: Run
    recovery: float
    retries: Retries

    def count(self, *statuses: int) -> int:
        return sum(each.status in statuses for each in self.run.outcomes)

    def p99(self) -> float:
        outcomes = self.run.outcomes
        return percentile(
            [each.seconds for each in outcomes if each.kind == "query" and each.status == 200], 0.99
        )


def share(hits: list[bool]) -> str:
    """The share that is true, and of how many."""
    return f"{sum(hits) / len(hits):.0%} of {len(hits)}" if hits else "-"


COLUMNS: tuple[Column, ...] = (
    ("load", lambda cell: cell.load),
    ("times capacity", lambda cell: f"{cell.times:g}"),
    ("deadline", lambda cell: f"{cell.deadline:g} s"),
    ("goodput of best", lambda cell: f"{cell.goodput / cell.best:.0%}"),
    ("queries/s", lambda cell: f"{cell.run.rate('query', WARM):.0f}"),
    ("documents/s", lambda cell: f"{cell.run.rate('document', WARM):.1f}"),
    ("p99 of queries", lambda cell: f"{cell.p99():.2f} s"),
    ("refused", lambda cell: f"{cell.count(503)}"),
    ("dropped or late", lambda cell: f"{len(cell.run.outcomes) - cell.count(200, 503)}"),
    ("recovery", lambda cell: f"{max(0.0, cell.recovery):.1f} s"),
    (
        "Retry-After within 2x",
        lambda cell: share([0.5 <= ratio <= 2 for ratio in cell.retries.ratios]),
    ),
    ("first retry succeeds", lambda cell: share(cell.retries.first)),
    ("generator lag", lambda cell: f"{cell.run.late:.2f} s"),
)


class Bench:
    """Runs against one service."""

    def __init__(self, host: str, port: int, seconds: float) -> None:
        self._address = host, port
        self._seconds = seconds
        self._alone: dict[Kind, float] = {}
        """Requests a second of each kind alone."""
        self._idle: dict[Kind, float] = {}
        """Seconds of a request to an idle service."""

    def _caller(self, seed: int) -> Caller:
        return Caller(*self._address, KEY, seed)

    def _choose(self, load: str, caller: Caller) -> Choose:
        if load != "mixed":
            return lambda: load  # type: ignore[return-value]
        share = 1 / (QUERIES_PER_DOCUMENT + 1)
        return lambda: "document" if caller.random.random() < share else "query"

    def _goodput(self, run: Run, skip: float) -> float:
        return sum(run.rate(kind, skip) / rate for kind, rate in self._alone.items())

    async def measure_kinds(self) -> None:
        """Measure what each kind alone reaches, and takes on an idle service."""
        kinds: tuple[Kind, ...] = ("query", "document")
        for kind in kinds:
            caller = self._caller(1)
            times = [(await caller.send(kind, 60)).seconds for _ in range(20)]
            self._idle[kind] = percentile(times, 0.5)
            run = await closed_loop(caller, self._choose(kind, caller), CALLERS, self._seconds)
            self._alone[kind] = run.rate(kind, WARM)
            caller.close()
            print(
                f"{kind}: {self._alone[kind]:.1f} requests/s, {1000 * self._idle[kind]:.0f} ms idle"
            )

    async def cell(self, load: str, times: float, deadline: float) -> Cell:
        """Measure the capacity, exceed it, and watch the service recover."""
        caller, other = self._caller(2), self._caller(3)
        choose = self._choose(load, caller)
        closed = await closed_loop(caller, choose, CALLERS, self._seconds / 2)
        capacity = closed.rate("query", 1.0) + closed.rate("document", 1.0)
        retries = Retries(other, deadline)
        run = await open_loop(
            caller,
            choose,
            rate=times * capacity,
            seconds=self._seconds,
            deadline=deadline,
            on_refusal=retries.sample,
        )
        recovery = await self._recovery(other, run, deadline)
        if run.waiting:
            await asyncio.wait(run.waiting, timeout=deadline + 5)
        after = await closed_loop(caller, choose, CALLERS, self._seconds / 2)
        caller.close()
        other.close()
        run.outcomes += retries.answered
        goodput = self._goodput(run, WARM)
        best = max((self._goodput(closed, 1.0) + self._goodput(after, 1.0)) / 2, goodput)
        return Cell(load, times, deadline, best, goodput, run, recovery, retries)

    async def _recovery(self, caller: Caller, run: Run, deadline: float) -> float:
        """Seconds from the load's end until a new query is answered as on an idle service, less
        the documents that may be computed just then."""
        prompt = max(0.1, 3 * self._idle["query"]) + self._idle["document"]
        while time.monotonic() < run.end + RECOVERY_LIMIT:
            outcome = await caller.send("query", min(deadline, 5.0))
            if outcome.status == 200 and outcome.seconds <= prompt:
                return outcome.sent - run.end
            await asyncio.sleep(0.05)
        return math.inf


def row(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


async def measure(options: argparse.Namespace, host: str, port: int) -> None:
    """Print the table."""
    bench = Bench(host, port, options.seconds)
    await bench.measure_kinds()
    print(row([name for name, _ in COLUMNS]))
    print(row(["---"] * len(COLUMNS)))
    for load in options.loads:
        for deadline in options.deadlines:
            for times in options.times:
                cell = await bench.cell(load, times, deadline)
                print(row([text(cell) for _, text in COLUMNS]), flush=True)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, if there is one: the generator should take as little of the machine as it can."""
    try:
        import uvloop
    except ImportError:
        return None
    new: Any = uvloop.new_event_loop
    return new  # type: ignore[no-any-return]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=["embedded", "vllm"], default="embedded")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each load")
    parser.add_argument("--times", type=float, nargs="+", default=[2.0, 5.0])
    parser.add_argument("--deadlines", type=float, nargs="+", default=[1.0, 5.0, 120.0])
    parser.add_argument("--loads", nargs="+", default=["query", "mixed"])
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        served(options.engine, Path(folder)) as address,
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        runner.run(measure(options, *address))


if __name__ == "__main__":
    main()
