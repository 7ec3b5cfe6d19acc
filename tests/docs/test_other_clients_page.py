"""The Python snippets of docs/other-clients.md run, against a server."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from serving import embedded_engine, serving

from kalm_integrations.models import EMBEDDED, KALM
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.service import EmbeddingService

PAGE = (Path(__file__).parents[2] / "docs/other-clients.md").read_text()
URL, KEY = "http://127.0.0.1:8000", "correct-horse"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    service = EmbeddingService(embedded_engine())
    with serving(create_app(service, keys=BearerKeys([SecretStr(KEY)]))) as url:
        yield url


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_every_python_block_runs(
    block: str, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("API_KEY", KEY)
    monkeypatch.setenv("MODEL", EMBEDDED.space.model)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert URL in block
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        exec(compile(block.replace(URL, url), "block", "exec"), {})
    assert re.search(r"prompt_tokens|K2 is 8,611 metres high", capsys.readouterr().out)


def test_the_page_names_the_model() -> None:
    assert {f"{KALM.space.model}:query", f"{KALM.space.model}:document"} <= set(
        re.findall(r"`([^`\n]+)`", PAGE)
    )
