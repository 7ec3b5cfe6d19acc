"""Draw what a query waits for while a bulk job runs: `pip install matplotlib` first.

python benchmarks/gpu/plot.py benchmarks/gpu/results/h100.jsonl docs/latency-under-load.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(results: Path, picture: Path) -> None:
    """Read rows of "bulk": of the run that swept the steps, and of the one as shipped."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kalm"
    from matplotlib import pyplot

    rows = [json.loads(line) for line in results.read_text().splitlines()]
    bulk = [row for row in rows if row.get("step") == "bulk" and row["stage"] == "steps bf16"]
    ours = [r for r in bulk if r["queries"] and "scheduler" not in r and "fill" not in r]
    theirs = [r for r in bulk if "scheduler" in r]
    now = [r for r in rows if r["run"] == "fifth" and r.get("queries")]
    now = [r for r in now if r["stage"] == "bf16 at 2048"]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for percentile, style in (("p99_ms", "o-"), ("p50_ms", "o--")):
        axes.plot(
            [row["tokens_per_second"] for row in ours],
            [row[percentile] for row in ours],
            style,
            color="tab:blue",
            label=f"our scheduler, {percentile[:3]}",
        )
    for some, style, color, label in (
        (theirs, "s", "tab:gray", "vLLM's priorities alone, p99"),
        (now, "^-", "tab:orange", "steps as graphs, as shipped, p99"),
    ):
        axes.plot(
            [row["tokens_per_second"] for row in some],
            [row["p99_ms"] for row in some],
            style,
            color=color,
            label=label,
        )
    for row in ours + theirs + now:
        place = (row["tokens_per_second"], row["p99_ms"])
        axes.annotate(f" {row['step_tokens']:,}", place, fontsize=8, va="bottom")
    axes.set_yscale("log")
    axes.set_yticks([50, 100, 200, 500, 1000], ["50", "100", "200", "500", "1,000"])
    axes.set_xlabel("bulk, tokens/s, with 10 queries a second between")
    axes.set_ylabel("a query's latency, ms")
    axes.set_title("H100, bf16, KaLM's shape: by the tokens of a step")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
