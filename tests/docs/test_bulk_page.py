"""docs/bulk.md: its blocks run, over one job, in the stores and libraries that it names."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/bulk.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
FACTS = [
    "Mount Everest is 8,849 metres tall.",
    "K2 is 8,611 metres tall.",
    "The Danube flows into the Black Sea.",
]


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the output of the page's first block."""
    folder = tmp_path_factory.mktemp("bulk")
    rows = [{"id": f"f{number}", "text": text} for number, text in enumerate(FACTS)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert int(run(BLOCKS[0], folder)) > 10
    return folder


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_every_block_runs(folder: Path, block: str) -> None:
    printed = run(block, folder)
    assert printed
    if "How tall is K2?" in block:
        assert "K2 is 8,611" in printed


def test_the_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the embedded engine, over input of the names that they have."""
    monkeypatch.setenv("KALM_BACKEND", "local")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.md").write_text(FACTS[0])
    (folder / "logs").mkdir()
    (folder / "logs" / "a.jsonl").write_text(json.dumps({"text": FACTS[1]}))
    rows = {"id": ["x"], "body": [FACTS[2]]}
    for name in ("corpus.parquet", "corpus-today.parquet"):
        pyarrow.parquet.write_table(pyarrow.table(rows), folder / name)
    text = "".join(re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL))
    commands = re.findall(r"^kalm .*$", text, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        _, *arguments = shlex.split(command.replace(" out", " own-out"))  # `out` is in use
        code = f"import sys; from kalm_integrations.cli import main; sys.exit(main({arguments}))"
        assert run(code, folder)
