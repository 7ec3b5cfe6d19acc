"""Output of `kalm eval`: a JSON document or a table, and a plot."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write(document: Mapping[str, Any], rows: Sequence[Mapping[str, str]], *, as_json: bool) -> None:
    """Print the document as JSON, or the rows as a table with the sizes of the texts above it."""
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    columns = {name: None for row in rows for name in row}
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(row.get(name, "") for name in columns))
    console = Console(highlight=False, markup=False)
    console.print(f"{document['documents']:,} documents, {document['queries']:,} queries")
    console.print(table)


def plot(intervals: Mapping[str, tuple[float, float, float]], label: str, path: Path) -> None:
    """Draw a low, a middle and a high value for each name into a file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.5 * len(intervals)), layout="constrained")
    axes = figure.subplots()
    for row, (low, middle, high) in enumerate(intervals.values()):
        axes.plot([low, high], [row, row], color="tab:blue")
        axes.plot(middle, row, "o", color="tab:blue")
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    figure.savefig(path)
