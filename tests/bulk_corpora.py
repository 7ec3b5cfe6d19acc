"""Small inputs of bulk jobs, and their outputs as any reader of Parquet reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kalm_integrations.bulk import Options

SMALL = Options(shard_rows=4)


def lines(path: Path, *rows: Any) -> Path:
    """JSON Lines; bytes are written as they are."""
    raw = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(row + b"\n" for row in raw))
    return path


def texts(path: Path, *given: Any) -> Path:
    return lines(path, *({"id": f"n{number}", "text": text} for number, text in enumerate(given)))


def table_of(folder: Path) -> pa.Table:
    return pq.read_table(folder / "shards")
