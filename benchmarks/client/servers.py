"""Try what docs/servers.md lists on a running server: `servers.py URL MODEL [KEY]`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from kalm_integrations import KalmClient

TEXTS = [f"text {i}" for i in range(40)]
LONG = "word " * 40_000
BAD = 6


def attempt(name: str, what: Callable[[], Any]) -> None:
    """Print the result, or the error."""
    try:
        print(f"{name}: {what()}")
    except Exception as error:  # noqa: BLE001
        indices = [each.index for each in getattr(error, "invalid", [])]
        print(f"{name}: {type(error).__name__} {indices or ''} {str(error)[:300]}")


def main(base_url: str, model: str, key: str | None = None) -> None:
    """Try everything."""
    client = KalmClient(
        base_url=base_url, model=model, api_key=key, query_instruction="none"
    ).with_options

    def embedded() -> tuple[Any, Any]:
        result = client().embed(TEXTS)
        return result.vectors.shape, result.usage.tokens

    def skipped() -> tuple[int, list[int]]:
        parts = list(client().iter_embed(with_long, on_error="skip"))
        return sum(map(len, parts)), [bad.index for part in parts for bad in part.rejected]

    def cut() -> list[float]:
        texts = [LONG + "one end", LONG + "another end", "another beginning " + LONG]
        vectors = client(truncate="end", vector_dtype="float32").embed(texts).vectors
        return [float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])]

    with_long = [LONG if i == BAD else text for i, text in enumerate(TEXTS)]
    native = client().embed(["a"]).vectors.shape[1]
    attempt("vectors, tokens", embedded)
    attempt(f"a long text at {BAD}", lambda: client().embed(with_long).vectors.shape)
    attempt("others, skipped", skipped)
    attempt("cut: same beginning (1.0), same end (not 1.0)", cut)
    attempt("native dimensions", lambda: client(dimensions=native).embed(["a"]).vectors.shape)
    attempt(
        "half the dimensions", lambda: client(dimensions=native // 2).embed(["a"]).vectors.shape
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
