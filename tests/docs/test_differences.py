"""docs/differences.md: its figures were measured, its claims of peers hold for those installed."""

from __future__ import annotations

import asyncio
import base64
import re
from pathlib import Path

import numpy as np
import pytest
from langchain_openai import OpenAIEmbeddings
from langchain_openai.embeddings import base as openai_of_langchain
from llama_index.embeddings.openai import OpenAIEmbedding
from pydantic import SecretStr
from serving import serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/differences.md").read_text()
GPU_NOTES = (ROOT / "benchmarks/gpu/NOTES.md").read_text()


def rows(heading: str) -> dict[str, list[str]]:
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: rest for name, *rest in cells}


def test_a_query_during_a_bulk_job() -> None:
    ours = re.search(r"^\| \*\*1,024\*\* \| \S+ \| \S+ \| \d+ \| \*\*(\d+)\*\*", GPU_NOTES, re.M)
    alone = re.search(r"^\| 2,048, vLLM's .* \| (\d+) \|$", GPU_NOTES, re.M)
    assert ours is not None
    assert alone is not None
    peer, here, _ = rows("From its peers")["a query during a bulk job"]
    assert f"p99 {alone[1]} ms" in peer
    assert f"p99 {ours[1]} ms" in here


@pytest.mark.parametrize("heading", ["From its peers", "Where a peer is better"])
def test_every_claim_has_a_source(heading: str) -> None:
    for name, cells in rows(heading).items():
        assert re.search(r"\]\(\S+\)|^read in [\d.]+", cells[-1]), name


class TestPeers:
    """What is claimed of the OpenAI classes, of those that are installed."""

    async def _answer(self, request: Request) -> JSONResponse:
        sent = await request.json()
        self.sent.append(sent["input"])
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(0.02)
        self.inside -= 1
        data = [
            {"object": "embedding", "index": i, "embedding": _vector(i)}
            for i in range(len(sent["input"]))
        ]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        answer = {"object": "list", "data": data[::-1], "model": "m", "usage": usage}
        return JSONResponse(answer)

    @pytest.fixture
    def url(self) -> object:
        self.sent: list[list[str]] = []
        self.inside = self.most = 0
        app = Starlette(routes=[Route("/v1/embeddings", self._answer, methods=["POST"])])
        with serving(app) as url:
            yield f"{url}/v1"

    def test_openai_embeddings(self, url: str) -> None:
        embeddings = OpenAIEmbeddings(
            base_url=url, api_key=SecretStr("k"), check_embedding_ctx_length=False, chunk_size=2
        )

        async def embedded() -> list[list[float]]:
            try:
                return await embeddings.aembed_documents(["a", "b", "c", "d", "e", "f"])
            finally:
                await embeddings.async_client._client.close()

        vectors = asyncio.run(embedded())
        assert [vector[0] for vector in vectors] == [1, 0] * 3  # as they came, not by index
        assert (len(self.sent), self.most) == (3, 1)  # one after the other
        embeddings.embed_query("q\nq")
        assert self.sent[-1] == ["q\nq"]  # nothing is added

    def test_openai_embeddings_as_it_comes(self) -> None:
        assert OpenAIEmbeddings.model_fields["check_embedding_ctx_length"].default is True
        pieces = openai_of_langchain._process_batched_chunked_embeddings
        (mean,) = pieces(1, [[1], [2]], [[1.0, 0.0], [0.0, 1.0]], [0, 0], skip_empty=False)
        assert mean == pytest.approx([0.5**0.5] * 2)

    def test_llama_indexs_class(self, url: str) -> None:
        model = OpenAIEmbedding(api_base=url, api_key="k", model_name="m")
        vectors = model.get_text_embedding_batch(["a\nb", "c"])
        assert self.sent == [["a b", "c"]]
        assert [vector[0] for vector in vectors] == [1, 0]


def _vector(index: int) -> str:
    """One dimension: the index."""
    return base64.b64encode(np.array([index], dtype="<f4").tobytes()).decode()
