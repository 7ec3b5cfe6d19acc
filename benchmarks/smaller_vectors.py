"""What smaller vectors find: `python benchmarks/smaller_vectors.py`, with the extra "local".

72 passages and as many questions of examples/, embedded by the small model: this compares formats,
and says nothing about KaLM. "same 10" is the share of float32's first ten results that are found.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kalm_integrations import KalmClient
from kalm_integrations.quantize import Int8Calibration, nearest_binary, rescore, to_binary

TEXTS = Path(__file__).parents[1] / "examples/retrieval_set.jsonl"
CANDIDATES = 20


def ranking(queries: NDArray[np.floating], documents: NDArray[np.floating]) -> NDArray[np.int64]:
    """The ten nearest documents of each query."""
    return np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :10]


def measured() -> dict[str, tuple[float, float, float]]:
    """Recall@1, recall@10 and same 10 of each format."""
    lines = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    client = KalmClient(backend="local", vector_dtype="float32")
    documents = client.embed([line["passage"] for line in lines]).vectors
    queries = client.embed([line["question"] for line in lines], role="query").vectors
    calibration = Int8Calibration.of(documents)
    codes = calibration.encode(documents)
    both = calibration.encode(queries).astype(np.float32)
    near = nearest_binary(to_binary(queries), to_binary(documents), CANDIDATES)
    found = {
        "float32": ranking(queries, documents),
        "int8 documents": ranking(queries, codes.astype(np.float32)),
        "int8 documents and queries": ranking(both, codes.astype(np.float32)),
        "binary": near[:, :10],
        f"binary, {CANDIDATES} rescored with int8": rescore(queries, near, codes, 10),
        f"binary, {CANDIDATES} rescored with float32": rescore(queries, near, documents, 10),
        "the first 256 of 512 numbers": ranking(queries[:, :256], documents[:, :256]),
    }
    right, exact = np.arange(len(lines))[:, None], found["float32"]
    return {
        name: (
            float((rows[:, :1] == right).any(axis=1).mean()),
            float((rows == right).any(axis=1).mean()),
            float(np.mean([np.isin(a, b).mean() for a, b in zip(exact, rows, strict=True)])),
        )
        for name, rows in found.items()
    }


if __name__ == "__main__":
    print("| vectors | recall@1 | recall@10 | same 10 |\n|---|---|---|---|")
    for name, figures in measured().items():
        print(f"| {name} | {' | '.join(f'{figure:.3f}' for figure in figures)} |")
