"""1,000 vectors of 3840 dimensions over Modal's RPC: our packed method beside plain lists.

    python benchmarks/client/rpc.py

The Modal client and the container's runtime are real; the cloud between them is the tests'
emulator on loopback, so that what is measured is the processors' work, not a network. `embed` gives
lists, in one call or in calls of 128 at a time; `KalmClient` keeps each answer under the 2 MiB that
need no blob storage; larger ones, of 512 texts, go through it, one after the other or four at a
time. The medians of interleaved runs.
"""

from __future__ import annotations

import os
import pickle
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "modal"))

import modal  # noqa: E402
from instant import MODEL  # noqa: E402
from modal_emulator import Emulator  # noqa: E402

from kalm_integrations import KalmClient  # noqa: E402
from kalm_integrations.codec import unpack  # noqa: E402

TEXTS = [f"text {i}" for i in range(1_000)]
BATCH = 128
BLOB_TEXTS = 512
"""In a call whose answer, 7.5 MiB of float32, goes through blob storage."""
BLOB_CALLS = 8
RUNS = 5
LISTS = "`embed`, one call: lists"


def main() -> None:
    """Measure, and print a table."""
    with Emulator() as emulator:
        emulator.deploy(HERE / "rpc_app.py", cwd=HERE)
        os.environ.update(emulator.client_env)
        service: Any = modal.Cls.from_name("rpc-benchmark", "VLLMEmbeddingSnapshot")()
        modal_app: dict[str, Any] = {
            "backend": "modal", "app_name": "rpc-benchmark", "model": MODEL, "dimensions": 3840
        }  # fmt: skip
        with (
            KalmClient(**modal_app) as narrow,
            KalmClient(**modal_app, vector_dtype="float32") as wide,
        ):
            ways = ways_of(service, narrow, wide)
            wall: dict[str, list[float]] = {name: [] for name in ways}
            cpu: dict[str, list[float]] = {name: [] for name in ways}
            for run in range(RUNS + 1):  # the first warms up
                for name, way in ways.items():
                    before, start = service.cpu.remote(), time.perf_counter()
                    vectors = way()
                    taken = time.perf_counter() - start
                    used = service.cpu.remote() - before
                    if run:
                        wall[name].append(1_000 * taken / vectors)
                        cpu[name].append(1_000 * used / vectors)
            lists = len(pickle.dumps(service.embed.remote(TEXTS), protocol=4))
    print("Of 1,000 vectors:\n")
    print("| way | wall, s | ratio | container, CPU s | ratio | MB |\n|---|---|---|---|---|---|")
    for name in ways:
        taken, used = statistics.median(wall[name]), statistics.median(cpu[name])
        size = (
            lists / 1e6
            if "lists" in name and "Kalm" not in name
            else 3.84 * (2 + 2 * ("32" in name))
        )
        print(
            f"| {name} | {taken:.2f} | {statistics.median(wall[LISTS]) / taken:.1f} | {used:.2f} "
            f"| {statistics.median(cpu[LISTS]) / used:.1f} | {size:.1f} |"
        )
    machine = f"Python {platform.python_version()}, {platform.machine()} {platform.system()}"
    print(f"\nMedian of {RUNS} interleaved runs; {machine}, {os.cpu_count()} cores; ", end="")
    print(f"modal {modal.__version__}.")


def ways_of(service: Any, narrow: KalmClient, wide: KalmClient) -> dict[str, Callable[[], int]]:
    """Each embeds, and gives the number of vectors that came."""
    big = {
        "texts": [f"text {i}" for i in range(BLOB_TEXTS)],
        "role": "document",
        "dtype": "float32",
    }

    def blobs(at_a_time: int) -> int:
        with ThreadPoolExecutor(at_a_time) as pool:
            answers = pool.map(
                lambda _: unpack(service.embed_packed.remote(big)["packed"]), range(BLOB_CALLS)
            )
            return sum(len(answer.vectors) for answer in answers)

    parts = [TEXTS[start : start + BATCH] for start in range(0, len(TEXTS), BATCH)]
    return {
        LISTS: lambda: len(service.embed.remote(TEXTS)),
        f"`embed.map`, {BATCH} a call: lists": lambda: sum(map(len, service.embed.map(parts))),
        "`KalmClient`: float16, to numpy": lambda: len(narrow.embed(TEXTS).vectors),
        "`KalmClient`: float32, to numpy": lambda: len(wide.embed(TEXTS).vectors),
        "`KalmClient`: float16, to lists": lambda: len(narrow.embed(TEXTS).to_lists()),
        f"blobs of {BLOB_TEXTS} float32, one by one": lambda: blobs(1),
        f"blobs of {BLOB_TEXTS} float32, 4 at a time": lambda: blobs(4),
    }


if __name__ == "__main__":
    main()
