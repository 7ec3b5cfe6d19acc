"""The picture of docs/performance.md: wall time and memory of every client, from results.json.

python benchmarks/client/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from clients import FLOOR

HERE = Path(__file__).resolve().parent
PICTURE = HERE.parents[1] / "docs" / "clients.svg"
SHOWN = (
    FLOOR,
    "KalmClient",
    "baseten-performance-client",
    "KalmModalEmbeddings, LangChain",
    "KalmModalEmbeddings, LlamaIndex",
    "openai",
    "baseten-performance-client, lists",
    "LlamaIndex OpenAILikeEmbedding",
    "LangChain OpenAIEmbeddings",
    "infinity_client",
    "LlamaIndex TextEmbeddingsInference",
)


def main() -> None:
    """Draw it."""
    many = json.loads((HERE / "results.json").read_text())["many"]
    matplotlib.rcParams["svg.hashsalt"] = "kalm"  # the same picture from the same figures
    figure, (seconds, memory) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    names = [name for name in SHOWN[::-1] if name in many]
    colours = [
        "#888888" if name == FLOOR else "#d9540a" if name.startswith("Kalm") else "#4c72b0"
        for name in names
    ]
    for axis, key, what, form in (
        (seconds, "wall", "seconds", "{:.2f}"),
        (memory, "mb", "MB", "{:,.0f}"),
    ):
        values = [many[name][key] for name in names]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
        axis.set_xlabel(what)
        axis.set_xlim(0, max(values) * 1.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.suptitle("10,000 vectors of 3,840 dimensions into Python: time and memory", fontsize=10)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
