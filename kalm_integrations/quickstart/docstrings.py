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

_SHORTEST: Final = 60  # characters: shorter docstrings say no more than their name
_KEPT: Final = 300  # characters: the embedded engine blurs longer texts into their mean
_MEDIANS: Final = ("statistics.median", "statistics.median_low", "statistics.median_high")
_OPENERS: Final = ("webbrowser.open", "webbrowser.open_new", "webbrowser.open_new_tab")
_PARSERS: Final = ("datetime.datetime.strptime", "datetime.datetime.fromisoformat")
QUESTIONS: Final = [
    Question("How do I parse a date from a string?", frozenset(_PARSERS)),
    Question("¿Cómo se calcula la mediana?", frozenset(_MEDIANS), "How is the median computed?"),
    Question("如何在浏览器中打开一个网页？", frozenset(_OPENERS), "How do I open a web page?"),
]
# What is not the library, and modules with hundreds of docstrings that few will ask for.
_SKIPPED: Final = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "ensurepip"}
    | {"distutils", "lib2to3", "encodings", "ntpath", "pydoc_data", "tkinter", "turtle"}
)
# Public modules whose source has another name, in some version of Python at least.
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


def read() -> Corpus:
    """The public standard library's docstrings, with three questions to them.

    Raises:
        ConfigurationError: This Python comes without its library's source.
    """
    library = Path(sysconfig.get_path("stdlib"))
    docstrings: dict[str, str] = {}
    for path in sorted(library.rglob("*.py")):
        if module := _module_name(path.relative_to(library)):
            try:
                tree = ast.parse(path.read_bytes())
            except (OSError, SyntaxError, ValueError):  # not every file is meant to be imported
                continue
            for name, docstring in _documented(tree, module):
                docstrings.setdefault(name, docstring)
    texts = [
        Text(name, f"{name}\n\n{docstring[:_KEPT]}")
        for name, docstring in docstrings.items()
        if len(docstring) >= _SHORTEST
    ]
    if not texts:
        raise ConfigurationError(
            f"{library} has no Python source to read docstrings from; name a folder of your own "
            "Markdown or text files instead"
        )
    origin = (
        f"{len(texts):,} docstrings of Python {platform.python_version()}'s standard library: all "
        f"public ones of {_SHORTEST} characters or more, the first {_KEPT} of each"
    )
    asker = "built in, in three languages; ✓ marks the hits that answer them"
    return Corpus(texts, "standard library", origin, QUESTIONS, asker)


def _module_name(path: Path) -> str | None:
    """The public name of the module at `path` in the library, or None if it has none."""
    parts = path.with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    module = _PUBLIC_NAMES.get(module, module)
    public = all(part.isidentifier() and part[0] != "_" for part in module.split("."))
    return module if public and _SKIPPED.isdisjoint(parts) else None


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of `node` and of everything public in it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if docstring := ast.get_docstring(node):
            yield name, docstring
        for child in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
            own = getattr(child, "name", "_")
            if own[0] != "_":
                yield from _documented(child, f"{name}.{own}")
