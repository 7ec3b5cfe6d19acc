"""Peak memory of `iter_embed` over 20,000 texts and over 200,000.

    python benchmarks/client/streaming.py

Texts come out of a generator, vectors are looked at and dropped; one process for each number.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from clients import _ours
from measure import memory
from run import PORTS, servers

from kalm_integrations import KalmClient


def grown(texts: int) -> float:
    """MB that the process grew by, at most, while so many texts were embedded."""
    client = KalmClient(**_ours(f"http://127.0.0.1:{PORTS[0]}"))
    client.embed([f"warm {i}" for i in range(1_000)])

    def given() -> Iterator[str]:
        for i in range(texts):
            yield f"a short text, number {i}"

    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    seen, total = 0, np.zeros(3840, dtype=np.float32)
    for part in client.iter_embed(given()):
        seen += len(part)
        total += part.vectors.sum(axis=0)
    assert seen == texts
    return memory("VmHWM") - before


def main() -> None:
    """Measure, and print the table."""
    print("| texts | MB |\n|---|---|")
    with servers():
        for texts in (20_000, 200_000):
            command = [sys.executable, __file__, str(texts)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            print(f"| {texts:,} | {float(done.stdout):.0f} |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(grown(int(sys.argv[1])))
    else:
        main()
