"""Every notebook runs from top to bottom, and shows what is committed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from notebooks import EXAMPLES, METADATA, NOTEBOOKS, executed, read
from pydantic import SecretStr
from scripted_engine import ScriptedEngine
from serving import serving

from kalm_integrations.models import EMBEDDED, KALM
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.service import EmbeddingService

SWITCH = "## Switch to Modal or HTTP"
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook: Any) -> list[Any]:
    """What each code cell shows, less the pictures: they differ from one matplotlib to the next."""
    return [
        [
            (output.output_type, output.get("text") or output.get("data", {}).get("text/plain"))
            for output in cell.outputs
        ]
        for cell in code(notebook)
    ]


def printed(notebook: Any, cell_id: str) -> str:
    (cell,) = (cell for cell in notebook.cells if cell.id == cell_id)
    return "".join(output.text for output in cell.outputs)


def switch(notebook: Any) -> Any:
    """The code cell under the heading that says how to switch; there is one."""
    cells = notebook.cells
    (heading,) = (i for i, cell in enumerate(cells) if cell.source.startswith(f"{SWITCH}\n"))
    assert cells[heading + 1].cell_type == "code"
    return cells[heading + 1]


def switched(source: str, backend: str) -> str:
    """The cell with the line for `backend` instead of the one for "local"."""
    named = re.compile(r'"?backend"?(=|: )"(\w+)"')
    lines = []
    for line in source.splitlines():
        if found := named.search(line):
            if found[2] == backend:
                lines.append(line.removeprefix("# "))
        else:
            lines.append(line)
    return "\n".join(lines)


def test_there_are_notebooks_and_each_is_listed() -> None:
    listed = re.findall(
        r"^\| \[(.+)\]\(\1\) \| .+ \| `jupyter lab examples/\1` \|$",
        (EXAMPLES / "README.md").read_text(),
        re.MULTILINE,
    )
    assert sorted(listed) == [path.name for path in NOTEBOOKS]
    assert len(listed) == 5


@every
def test_it_runs_and_shows_what_is_committed(path: Path) -> None:
    committed = read(path)
    assert shown(executed(committed)) == shown(committed)


@every
def test_it_is_committed_as_make_notebooks_leaves_it(path: Path) -> None:
    notebook = read(path)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == METADATA
    assert all(cell.metadata == {} for cell in notebook.cells)
    numbers = [cell.execution_count for cell in code(notebook)]
    assert numbers == list(range(1, len(numbers) + 1))


@every
def test_what_it_shows_reads_well_anywhere(path: Path) -> None:
    for output in (output for cell in code(read(path)) for output in cell.outputs):
        assert output.get("name", "stdout") == "stdout"
        assert output.output_type in ("stream", "display_data", "execute_result")
        data: Mapping[str, str] = output.get("data", {})
        assert data.keys() <= {"text/plain", "image/png"}
        assert len(data.get("image/png", "")) * 3 / 4 < 60_000
        text = output.get("text", "") + data.get("text/plain", "")
        assert text.isprintable() or re.fullmatch(r"[^\x00-\x09\x0b-\x1f\x7f]*", text)
        assert not re.search(r"(?<![\w.:/])/\w+/\w|\b[A-Z]:\\|Warning|127\.0\.0\.1", text), text


@every
def test_every_link_leads_somewhere(path: Path) -> None:
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", text)
    assert links
    assert [link for link in links if not (EXAMPLES / link).exists()] == []


@every
@pytest.mark.parametrize("backend", ["local", "modal", "http"])
def test_the_backend_is_switched_in_one_cell(path: Path, backend: str) -> None:
    notebook = read(path)
    source = switch(notebook).source
    assert "# KaLM on Modal, after `modal setup` and `kalm deploy`:" in source
    names: dict[str, Any] = {}
    exec(switched(source, backend), names)
    if path.stem == "llama_index_rag":
        made = names["Settings"].embed_model
    elif path.stem == "langchain_rag":
        made = names["embeddings"]
    else:
        from kalm_integrations import KalmClient

        made = KalmClient(**names["SERVICE" if "SERVICE" in names else "NEW"])
    config = getattr(made, "client", made).config
    assert config.resolved_backend == backend
    assert config.expected_space == (EMBEDDED if backend == "local" else KALM).space


class KalmShaped(ScriptedEngine):
    """An engine of KaLM's identity and dimensions. What it finds means nothing."""

    identity = KALM.space
    dimensions = KALM.dimensions
    query_template = KALM.query_template

    def right(self, texts: Any) -> Any:
        seeds = [int.from_bytes(text.encode()[-64:], "big") for text in texts]
        rows = [np.random.default_rng(seed).standard_normal(self.dimensions[0]) for seed in seeds]
        return np.array([row / np.linalg.norm(row) for row in rows], dtype=np.float32)


def test_the_dimensions_of_a_service_with_kalm() -> None:
    notebook = read(EXAMPLES / "dimensions_and_prompts.ipynb")
    service = EmbeddingService(KalmShaped())
    with serving(create_app(service, keys=BearerKeys([SecretStr("correct-horse")]))) as url:
        cell = switch(notebook)
        cell.source = switched(cell.source, "http").replace("https://kalm.example", url)
        ran = executed(notebook, {"KALM_API_KEY": "correct-horse", "NO_PROXY": "*"})
    assert printed(ran, "switch") == f"{KALM.space.model}\n"
    sizes = re.findall(r"^ *(\d+)   recall@1", printed(ran, "cut"), re.MULTILINE)
    assert sizes == list(map(str, KALM.dimensions))
    assert printed(ran, "service") == "256 dimensions; as cut here: True\n"
