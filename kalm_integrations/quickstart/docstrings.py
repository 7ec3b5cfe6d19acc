"""The built-in corpus: docstrings of the Python standard library that runs this very program."""

from __future__ import annotations

import ast
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.quickstart.corpus import Corpus, Question, Text

MIN_CHARACTERS: Final = 60
"""Shorter docstrings say no more than their name."""

KEPT_CHARACTERS: Final = 300
"""The summary and what follows it. The embedded engine blurs longer texts into their mean."""

QUESTIONS: Final = [
    Question(
        "How do I parse a date from a string?",
        expected=frozenset({"datetime.datetime.strptime", "datetime.datetime.fromisoformat"}),
    ),
    Question(
        "¿Cómo se calcula la mediana?",
        expected=frozenset(
            {"statistics.median", "statistics.median_low", "statistics.median_high"}
        ),
        meaning="How is the median computed?",
    ),
    Question(
        "如何在浏览器中打开一个网页？",
        expected=frozenset({"webbrowser.open", "webbrowser.open_new", "webbrowser.open_new_tab"}),
        meaning="How do I open a web page?",
    ),
]

# What is not the library, and modules with hundreds of docstrings that few will ask for.
_SKIPPED: Final = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "ensurepip"}
    | {"distutils", "lib2to3", "encodings", "ntpath", "pydoc_data", "tkinter", "turtle"}
)

# Public modules whose source lives under another name, in some version of Python at least.
_PUBLIC_NAMES: Final = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "concurrent.futures._base": "concurrent.futures",
    "genericpath": "os.path",
    "pathlib._local": "pathlib",
    "posixpath": "os.path",
    "zipfile._path": "zipfile",
}

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read() -> Corpus:
    """The public standard library's docstrings, with three questions to them.

    Raises:
        ConfigurationError: This Python comes without its library's source.
    """
    library = Path(sysconfig.get_path("stdlib"))
    texts = [
        Text(name, f"{name}\n\n{docstring[:KEPT_CHARACTERS]}")
        for name, docstring in _docstrings(library).items()
        if len(docstring) >= MIN_CHARACTERS
    ]
    if not texts:
        raise ConfigurationError(
            f"{library} has no Python source to read docstrings from; name a folder of your own "
            "Markdown or text files instead"
        )
    return Corpus(
        texts,
        f"{len(texts):,} docstrings of Python {platform.python_version()}'s standard library: all "
        f"public ones of {MIN_CHARACTERS} characters or more, the first {KEPT_CHARACTERS} of each",
        QUESTIONS,
        "built in, in three languages; ✓ marks the hits that answer them",
    )


def _docstrings(library: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(library.rglob("*.py")):
        module = _module_name(path.relative_to(library))
        if module is None:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):  # not every file there is meant to be imported
            continue
        for name, docstring in _documented(tree, module):
            found.setdefault(name, docstring)
    return found


def _module_name(path: Path) -> str | None:
    """The public name of the module at `path` in the library, or None if it has none."""
    parts = path.with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    module = _PUBLIC_NAMES.get(module, module)
    public = all(part.isidentifier() and _is_public(part) for part in module.split("."))
    return module if public and _SKIPPED.isdisjoint(parts) else None


def _documented(node: _Documented, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of `node` and of everything public in it."""
    if docstring := ast.get_docstring(node):
        yield name, docstring
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, _Documented) and _is_public(child.name):
                yield from _documented(child, f"{name}.{child.name}")


def _is_public(name: str) -> bool:
    return not name.startswith("_")
