"""What an import costs, ours beside the peers'.

    python benchmarks/import_time.py            # prints a Markdown table

Every import runs in an interpreter of its own. The rounds are interleaved, so that whatever else
the machine does hits all rows alike; the median of the rounds is given. "over the bare
interpreter" is wall time of `python -c "import X"` less that of `python -c ""`.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from importlib.metadata import version

BARE = "pass"
ROWS = {
    "kalm_integrations": "import kalm_integrations",
    "kalm_integrations.KalmClient": "from kalm_integrations import KalmClient",
    "kalm_integrations.langchain": "import kalm_integrations.langchain",
    "langchain_core Embeddings (its floor)": "from langchain_core.embeddings import Embeddings",
    "langchain_openai (peer)": "import langchain_openai",
    "kalm_integrations.llama_index": "import kalm_integrations.llama_index",
    "llama_index BaseEmbedding (its floor)": "import llama_index.core.base.embeddings.base",
    "llama_index.embeddings.openai (peer)": "import llama_index.embeddings.openai",
}
PACKAGES = [
    "kalm-integrations",
    "numpy",
    "pydantic",
    "langchain-core",
    "langchain-openai",
    "llama-index-core",
    "llama-index-embeddings-openai",
]


def seconds(code: str) -> float:
    """Wall time of a new interpreter that runs `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def measure(rounds: int) -> dict[str, float]:
    """Median seconds of each row, over the bare interpreter."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for code in [BARE, *ROWS.values()]:
        seconds(code)  # byte-code and file caches
    for _ in range(rounds):
        for code in [BARE, *ROWS.values()]:
            times[code].append(seconds(code))
    bare = statistics.median(times[BARE])
    return {name: statistics.median(times[code]) - bare for name, code in ROWS.items()}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    medians = measure(rounds)
    print("| import | ms |")
    print("|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {1000 * median:.0f} |")
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    machine = f"Python {platform.python_version()}, {platform.machine()} {platform.system()}"
    print(f"\nMedian of {rounds} interleaved rounds; {machine}; {versions}.")


if __name__ == "__main__":
    main()
