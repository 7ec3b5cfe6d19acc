"""The documents tell the truth: every Python block runs, every table agrees with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kalm_integrations import langchain_errors, prompts, validation
from kalm_integrations.cli import build_app
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import KalmError, subclasses
from modal_backend import admission, service
from modal_backend.http import app as http_app
from modal_backend.http import schema

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LINKING = sorted({*PAGES, *ROOT.glob("*.md"), ROOT / "examples/README.md"})
# Their blocks run in test_{bulk,other_clients}_page.py, test_site.py and tests/environments.
CONTINUED = ("bulk.md", "tutorial.md", "environments.md", "other-clients.md")
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    if page.name not in CONTINUED
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the table under `heading`, less its head."""
    section = (ROOT / page).read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_path_of_the_architecture_page_exists() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    named = re.findall(r"`([\w./-]+(?:\.(?:py|txt|toml)|/))`", page)
    assert len(named) > 30
    assert [path for path in named if not (ROOT / path).exists()] == []


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(page), re.MULTILINE):
        text = re.sub(r"!?\[(.*?)\]\(.*?\)", r"\1", heading)  # a link is its text
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{n}" if n else slug for slug, last in found.items() for n in range(last + 1)}


def dead_links(page: Path) -> list[str]:
    """The links of a page, to files and headings here, that lead nowhere."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    dead = []
    for link in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


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


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_the_link_check_sees_what_is_dead(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text(
        "# `kalm` & Modal's *RPC*, [fast](x)\n```bash\n# no heading\n```\n## Twice\n## Twice\n"
    )
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](there.md) [b](there.md#kalm--modals-rpc-fast) [c](there.md#twice-1)\n"
        "[d](#here) [e](https://host/#x) `[f](f.md)`\n```text\n[g](g.md)\n```\n"
        "[h](h.md) [i](there.md#no-heading) [j](there.md#twice-2) [k](#nowhere) ![l](l.svg)\n"
    )
    dead = ["h.md", "there.md#no-heading", "there.md#twice-2", "#nowhere", "l.svg"]
    assert dead_links(page) == dead


def test_the_index_lists_every_page_once() -> None:
    index = ROOT / "docs/README.md"
    listed = re.findall(r"^- \[.+\]\(([\w-]+\.md)\): .+$", index.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(
        page.name for page in (ROOT / "docs").glob("*.md") if page != index
    )


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


def test_every_argument_is_documented_with_its_default() -> None:
    fields = ClientConfig.model_fields
    table = rows("docs/arguments.md", "All arguments") + rows("docs/failover.md", "Slow queries")
    documented = {name.strip("`"): default for name, default, _ in table}
    named = {field.alias or name: field for name, field in fields.items()}
    assert documented.keys() == named.keys()
    for name, default in documented.items():
        value = named[name].default
        shown = f"{value:g}" if isinstance(value, float) else repr(value).replace("'", '"')
        assert default == f"`{shown}`", name


def test_every_error_is_documented_as_it_is() -> None:
    documented = rows("docs/errors.md", "Classes")
    assert [row[0] for row in documented] == [f"`{k.__name__}`" for k in subclasses(KalmError)[1:]]
    for kind, (_, happened, code, status) in zip(
        subclasses(KalmError)[1:], documented, strict=True
    ):
        assert happened == " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        assert code == f"`{kind.code}`"
        assert status == ("" if kind.status == KalmError.status else str(kind.status))
    retries = (ROOT / "docs/errors.md").read_text().split("## Retries\n")[1].split("\n## ")[0]
    retryable = {k.__name__ for k in subclasses(KalmError) if k.retryable}
    assert set(re.findall(r"`(\w+Error)`", retries)) == retryable


def test_langchains_errors_are_documented_as_they_are() -> None:
    documented = {
        name: theirs.strip("`")
        for theirs, ours in rows("docs/errors.md", "In LangChain")
        for name in re.findall(r"`(\w+)`", ours)
    }
    assert documented == {ours.__name__: name for ours, name in langchain_errors.FAMILY.items()}


@pytest.mark.parametrize("name", ["retrieval", "compare"])
def test_every_argument_of_eval_is_documented_with_its_default(name: str) -> None:
    command = build_app()["eval"][name]
    options = {
        each.name: each.field_info.default
        for each in command.assemble_argument_collection()
        if each.name.startswith("--")
    }
    documented = {
        name: default.strip("`")
        for names, default, *_ in rows("docs/evaluate.md", f"kalm eval {name}")
        for name in re.findall("`(--[a-z-]+)`", names)
    }
    assert documented.keys() == options.keys()
    for option in {"--sample", "--k", "--split"} & options.keys():
        default = options[option]
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        assert documented[option] == shown


def test_the_limits_of_the_http_api() -> None:
    documented = rows("docs/http.md", "A request")
    shown = {row[0]: row[1] for row in documented if len(row) == 3}
    assert shown["body"] == f"{http_app.MAX_BODY_BYTES // 2**20} MiB"
    assert shown["texts in a request"] == f"{service.MAX_TEXTS:,}"
    assert shown["characters in a text"] == f"{validation.MAX_CHARACTERS:,}"
    assert shown["characters in an instruction"] == f"{schema.MAX_INSTRUCTION:,}"
    prompted = "characters in all texts, with the instruction in each"
    assert shown[prompted] == f"{schema.MAX_PROMPTED:,}"
    priority = next(row for row in documented if row[0] == "`priority`")
    assert f"{service.MAX_QUERY_CHARACTERS:,}" in priority[2]
    for role, name in (("document", "documents"), ("query", "queries")):
        assert shown[f"texts in progress, {name}"] == f"{admission.MAX_WAITING[role]:,}"  # type: ignore[index]
        wait = f"{admission.MAX_WAIT[role]:g} s"  # type: ignore[index]
        assert shown[f"estimated wait, {name}"] == wait
    share = f"{admission.DEADLINE_SHARE:.0%} of what is left of `X-Kalm-Timeout`"
    assert shown["estimated wait and service"] == share
