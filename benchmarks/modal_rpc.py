"""1,000 vectors of 3840 dimensions over Modal's RPC: our packed method beside plain lists.

    python benchmarks/modal_rpc.py

The Modal client and the container's runtime are real; the cloud between them is the tests'
emulator on loopback, so that what is measured is the processors' work, not a network. Three ways:
`embed` with all texts in one call, `embed` in calls of 128 at a time, and `KalmClient`; the medians
of interleaved runs.
"""

from __future__ import annotations

import os
import pickle
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "modal"))

import modal  # noqa: E402
from modal_emulator import Emulator  # noqa: E402
from modal_rpc_app import MODEL  # noqa: E402

from kalm_integrations import KalmClient  # noqa: E402

TEXTS = [f"text {i}" for i in range(1_000)]
BATCH = 128
RUNS = 5


def main() -> None:
    """Measure, and print a table."""
    with Emulator() as emulator:
        emulator.deploy(HERE / "modal_rpc_app.py", cwd=HERE.parent)
        os.environ.update(emulator.client_env)
        service: Any = modal.Cls.from_name("rpc-benchmark", "VLLMEmbeddingSnapshot")()
        client = KalmClient(backend="modal", app_name="rpc-benchmark", model=MODEL)

        def packed() -> int:
            return len(client.embed(TEXTS).vectors)

        def packed_to_lists() -> int:
            return len(client.embed(TEXTS).to_lists())

        def one_call() -> int:
            return len(service.embed.remote(TEXTS))

        def batches() -> int:
            parts = [TEXTS[i : i + BATCH] for i in range(0, len(TEXTS), BATCH)]
            return sum(len(part) for part in service.embed.map(parts))

        ways: dict[str, Callable[[], int]] = {
            "embed, one call (lists)": one_call,
            f"embed.map, {BATCH} a call (lists)": batches,
            "KalmClient, packed, to numpy": packed,
            "KalmClient, packed, to lists": packed_to_lists,
        }
        wall: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        for run in range(RUNS + 1):  # the first warms up
            for name, way in ways.items():
                before, start = service.cpu.remote(), time.perf_counter()
                assert way() == len(TEXTS)
                taken = time.perf_counter() - start
                used = service.cpu.remote() - before
                if run:
                    wall[name].append(taken)
                    cpu[name].append(used)
        lists = len(pickle.dumps(service.embed.remote(TEXTS), protocol=4))
        request = {"texts": TEXTS[:BATCH], "role": "document", "dtype": "float16"}
        each = len(pickle.dumps(service.embed_packed.remote(request), protocol=4))

    base = "embed, one call (lists)"
    print(
        f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} cores,"
    )
    print(f"modal {modal.__version__}; medians of {RUNS}\n")
    heads = f"{'wall s':>8}{'ratio':>7}{'container s':>13}{'ratio':>7}{'MB':>8}"
    print(f"{'':<34}{heads}")
    sizes = {name: each * len(TEXTS) / BATCH if "packed" in name else lists for name in ways}
    for name in ways:
        taken, used = statistics.median(wall[name]), statistics.median(cpu[name])
        print(
            f"{name:<34}{taken:>8.2f}{statistics.median(wall[base]) / taken:>7.1f}"
            f"{used:>13.2f}{statistics.median(cpu[base]) / used:>7.1f}{sizes[name] / 1e6:>8.1f}"
        )
    client.close()


if __name__ == "__main__":
    main()
