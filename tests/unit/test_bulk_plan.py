"""Parts of a plan, as a job that resumes reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kalm_integrations.bulk.plan import Options, make_plan
from kalm_integrations.readers.source import Source


@pytest.mark.parametrize("begin", range(6))
def test_parts_from_any_shard_on_are_those_of_the_whole_over_several_files(
    tmp_path: Path, begin: int
) -> None:
    for number, rows in enumerate((3, 1, 5)):
        lines = (f'{{"text": "file {number}, row {row}"}}\n' for row in range(rows))
        (tmp_path / f"{number}.jsonl").write_text("".join(lines))
    plan = make_plan(Source(str(tmp_path)), "error", Options(shard_rows=2), lambda _: None)
    whole = [(part.number, part.start, part.texts, part.places) for part in plan.parts()]
    assert [len(texts) for _, _, texts, _ in whole] == [2, 2, 2, 2, 1]
    resumed = [(part.number, part.start, part.texts, part.places) for part in plan.parts(begin)]
    assert resumed == whole[begin:]
