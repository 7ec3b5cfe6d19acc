"""`kalm serve` as a process, as a user starts it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

KEY = "correct-horse"
LOADING = 400  # seconds that a load may take on a machine that has other things to do


class Serving:
    """`kalm serve` in a process group of its own, as in a terminal."""

    def __init__(self, log: Path, *arguments: str | Path) -> None:
        self._log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kalm_integrations.cli", "serve", "--port", "0", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # As on one GPU: the core runs the model itself, without one more process for it.
                env=os.environ
                | {
                    "KALM_API_KEY": KEY,
                    "OMP_NUM_THREADS": "1",
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                },
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def url(self) -> str:
        self.wait_until(lambda: "\nkalm serve: ready: " in self.log, LOADING)
        (url,) = re.findall(
            r"^kalm serve: ready: .*, on (http://127\.0\.0\.1:\d+)$", self.log, re.M
        )
        return str(url)

    def wait_until(self, true: Callable[[], Any], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, self.log
            assert self.process.poll() is None, self.log
            time.sleep(0.02)

    def others(self) -> list[psutil.Process]:
        """The processes that it has started, and those that they have."""
        return list(psutil.Process(self.process.pid).children(recursive=True))

    def cores(self) -> list[psutil.Process]:
        return named("VLLM::EngineCor", self.others())

    def core(self) -> psutil.Process:
        (core,) = self.cores()
        return core

    def ends(self, seconds: float) -> tuple[int, str]:
        """Its exit status, and the last of our lines."""
        status = self.process.wait(seconds)
        return status, [line for line in self.log.splitlines() if line.startswith("kalm serve")][-1]


def end(serving: Serving) -> None:
    """Kill it outright: none of its processes may outlive it."""
    if serving.process.poll() is None:
        others = serving.others()
        serving.process.kill()  # CoreGuard does the rest
        serving.process.wait()
        assert gone(others)


def named(start: str, processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those whose name starts so. A process that has ended meanwhile has no name."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith(start):
                found.append(process)
    return found


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=10)[1]
