"""docs/migration.md: its commands run, with the embedded engine on both sides."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from kalm_integrations.cli import main

PAGE = (Path(__file__).parents[2] / "docs/migration.md").read_text()


def test_filling_does_not_undo_what_is_written_meanwhile() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    before, found, after = block.partition("start, size =")
    page: dict[str, Any] = {}
    exec(before, page)
    client = page["client"]

    class WrittenTo:
        vector_identity = client.vector_identity

        def embed(self, texts: list[str], **options: Any) -> Any:
            page["client"] = client
            page["write"](["1"], ["Bread falls."])
            return client.embed(texts, **options)

    page["client"] = WrittenTo()
    exec(found + after, page)
    (point,) = page["qdrant"].retrieve(page["new"], [1])
    assert point.payload == {"text": "Bread falls."}


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("handbook")
    (folder / "qrels").mkdir(parents=True)
    texts = ["K2 is 8,611 metres high.", "Bread rises because yeast gives off gas."]
    rows = [{"_id": f"d{number}", "text": text} for number, text in enumerate(texts)]
    corpus = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "corpus.jsonl").write_text(corpus)
    more = "".join(json.dumps({"text": f"Text number {number}."}) + "\n" for number in range(20))
    Path("handbook.jsonl").write_text(more)
    questions = [
        {"_id": "q0", "text": "How tall is K2?"},
        {"_id": "q1", "text": "Why rises bread?"},
    ]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    qrels = "query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n"
    (folder / "qrels/test.tsv").write_text(qrels)
    (block,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    commands = [line for line in block.replace("\\\n", "").splitlines() if line.strip()]
    assert [shlex.split(command)[2] for command in commands] == ["retrieval", "compare"]
    for command in commands:
        words = shlex.split(command)[1:]
        assert main(["local" if word.startswith("https://") else word for word in words]) == 0
