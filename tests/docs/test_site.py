"""The documentation site builds without a warning; the tutorial and the extras are as they say.

`make docs-test` opens the site in a browser.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
MKDOCS = Path(sys.executable).parent / "mkdocs"
TUTORIAL = (ROOT / "docs/tutorial.md").read_text()


def build(tree: Path, site: Path) -> subprocess.CompletedProcess[str]:
    # Not with --quiet, which hides warnings from --strict.
    command = [MKDOCS, "build", "--strict", "--site-dir", site]
    return subprocess.run(command, cwd=tree, check=False, capture_output=True, text=True)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api/index.html").read_text()
    assert 'id="kalm_integrations.client.KalmClient.embed"' in api
    assert "Texts that cannot be embedded, by index" in api
    tutorial = (tmp_path / "tutorial/index.html").read_text()
    assert "/blob/main/examples/README.md" in tutorial


def test_the_build_sees_what_is_wrong(tmp_path: Path) -> None:
    links = "[a](page.md#nowhere) [b](gone.md) [c](../gone.md) [d](../mkdocs.yml)"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/README.md").write_text(f"# Home\n{links}\n")
    (tmp_path / "docs/page.md").write_text("# Page\n")
    (tmp_path / "docs/forgotten.md").write_text("# Not in the navigation\n")
    (tmp_path / "mkdocs_hooks.py").write_text((ROOT / "mkdocs_hooks.py").read_text())
    settings = f"INHERIT: {ROOT}/mkdocs.yml\nnav: [README.md, page.md]\n"
    (tmp_path / "mkdocs.yml").write_text(settings)
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode
    for wrong in ("page.md#nowhere", "'gone.md'", "'../gone.md'", "forgotten.md"):
        assert wrong in done.stderr
    assert "../mkdocs.yml" not in done.stderr


def test_the_tutorial(tmp_path: Path) -> None:
    """Its programs share a folder; each prints what the page shows below it."""
    parts = re.split(r"^```(\w*)\n(.*?)^```$", TUTORIAL, flags=re.MULTILINE | re.DOTALL)
    blocks = list(zip(parts[1::3], parts[2::3], strict=True))
    programs = [n for n, (language, _) in enumerate(blocks) if language == "python"]
    sources = [blocks[number][1] for number in programs]
    done = subprocess.run(  # one process, because imports take seconds; a namespace for each
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            f"for it in {sources!r}:\n exec(it, {{}})\n print('%')",
        ],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [blocks[number + 1] for number in programs] == [
        ("text", output) for output in done.stdout.split("%\n")[:-1]
    ]


def test_every_extra_is_on_the_page() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = settings["project"]["optional-dependencies"].keys()
    page = (ROOT / "docs/install.md").read_text()
    ours = {"dev", "docs", "docs-test"}  # for contributors
    cells = re.findall(r"^\| (`.+?) \|", page, re.MULTILINE)
    assert set(re.findall(r"`([\w-]+)`", " ".join(cells))) == extras - ours
