"""docs/architecture.md is the code's: its paths exist, all modules are in it, imports obey it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()
PACKAGES = ("kalm_integrations", "modal_backend")
NAMED = {
    "modal_backend.admission": {"kalm_integrations.batching.estimate_tokens"},
    "modal_backend.engines.priority_lock": {"kalm_integrations.batching.estimate_tokens"},
    "modal_backend.service": {"kalm_integrations.verify.wrong_rows"},
    "modal_backend.settings": {"kalm_integrations.settings.DEFAULT_APP"},
}
"""What crosses to the client beside the shared words."""
CLIENTS = {"modal_backend.proof", "modal_backend.bulk.embedding"}
CORPORA = ("entrances", "bulk jobs")
"""Layers of the backend that share the modules of bulk jobs with the commands."""


def layers(package: str) -> list[tuple[str, list[str]]]:
    """The rows of the package's table, from the top: layer, paths within the package."""
    section = PAGE.split(f"### {package}\n")[1].split("\n### ")[0]
    rows = re.findall(r"^\| ([a-z ]+) \| (`.*`) \|$", section, re.MULTILINE)
    return [(layer, re.findall(r"`([^`]+)`", modules)) for layer, modules in rows]


def dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


LAYER = {
    dotted(f"{package}/{path}"): (package, number, layer)
    for package in PACKAGES
    for number, (layer, paths) in enumerate(layers(package))
    for path in paths
}


def imports(module: str) -> Iterator[str]:
    """What a module imports of ours, "module.name" where it is a name; not for type checkers."""
    path = ROOT / (module.replace(".", "/") + ".py")
    if not path.exists():
        path = path.with_suffix("") / "__init__.py"
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGES):
            assert not node.level
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith(PACKAGES))
        waiting += ast.iter_child_nodes(node)


def home(imported: str) -> str:
    """The module that holds what was imported."""
    return imported if imported in LAYER else imported.rpartition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_its_place(package: str) -> None:
    placed = [path for _, paths in layers(package) for path in paths]
    there = [str(path.relative_to(ROOT / package)) for path in (ROOT / package).rglob("*.py")]
    assert sorted(placed) == sorted(there)


def test_every_path_exists() -> None:
    named = re.findall(r"`([\w./-]+(?:\.(?:py|txt|toml)|/))`", PAGE)
    assert len(named) > 100
    bases = [ROOT, *(ROOT / package for package in PACKAGES)]
    assert [path for path in named if not any((base / path).exists() for base in bases)] == []


def test_every_module_of_the_picture_exists() -> None:
    (picture,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert max(map(len, picture.splitlines())) <= 100
    stems = {
        Path(path).stem for package in PACKAGES for _, paths in layers(package) for path in paths
    }
    assert set(re.findall(r"(\w+)\.py", picture)) <= stems
    inner = {
        "inputs",
        "prompts",
        "batching",
        "flight",
        "retry",
        "verify",
        "http_guard",
        "admission",
    }
    assert inner <= stems & set(re.findall(r"\w+", picture))


@pytest.mark.parametrize("module", LAYER)
def test_imports_go_down(module: str) -> None:
    package, mine, _ = LAYER[module]
    for imported in imports(module):
        theirs, number, layer = LAYER[home(imported)]
        if theirs == package:
            assert number >= mine, f"{module} imports {imported}, of {layer}, above it"


@pytest.mark.parametrize("module", LAYER)
def test_what_crosses_between_the_packages(module: str) -> None:
    package, _, layer = LAYER[module]
    for imported in imports(module):
        theirs, _, their_layer = LAYER[home(imported)]
        if theirs == package or layer == "commands" or module in CLIENTS:
            continue
        if package == "modal_backend":
            shared = their_layer in ("shared words", "names")
            shared |= their_layer == "corpora" and layer in CORPORA
            assert shared or imported in NAMED.get(module, ()), imported
        else:
            assert module == "kalm_integrations.transports.in_process", imported
