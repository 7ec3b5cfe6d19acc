"""The documents tell the truth: every Python block runs, every table agrees with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kalm_integrations import prompts
from kalm_integrations.settings import ClientSettings

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the table under `heading`, less its head."""
    section = (ROOT / page).read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_python_block_runs_as_it_stands(block: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_presets() -> None:
    documented = {
        name.strip("`"): prompts.Preset(task, symmetric=both == "yes")
        for name, task, both in rows("docs/prompts.md", "Presets")
    }
    assert documented == prompts.PRESETS


def test_the_forms_of_an_instruction() -> None:
    def plain(cell: str) -> str:
        return cell.strip("`").replace("␠", " ").replace("⏎", "\n")

    table = (ROOT / "docs/prompts.md").read_text()
    shown = re.findall(r'^\|[^|`]*`"(.+?)"`[^|]*\| `([^`]+)` \|', table, re.MULTILINE)
    assert len(shown) == 6
    for instruction, seen in shown:
        if "…" not in seen:
            assert prompts.resolve(instruction) == plain(seen)
    assert prompts.resolve("mteb:web_search").endswith(" \n Query: {text}")


def test_every_argument_is_in_the_readme_with_its_default() -> None:
    fields = ClientSettings.model_fields
    documented = {name.strip("`"): default for name, default, _ in rows("README.md", "Arguments")}
    assert documented.keys() == fields.keys()
    for name, default in documented.items():
        value = fields[name].default
        shown = f"{value:g}" if isinstance(value, float) else repr(value).replace("'", '"')
        assert default == f"`{shown}`", name
