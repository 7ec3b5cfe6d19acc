"""Signatures and docstrings of classes whose arguments are a `TypedDict`.

Type checkers read `**options: Unpack[ClientOptions]`. `help()` and `inspect.signature` do not, so
`documented` lists every argument for them, from the same place, when they ask.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Never, TypeVar, get_type_hints

T = TypeVar("T", bound=type)


def documented(
    options: type, *others: inspect.Parameter, defaults: Callable[[], Mapping[str, Any]]
) -> Callable[[T], T]:
    """Give a class the signature and the docstring that list its arguments.

    Args:
        options: A `TypedDict` with a docstring under each key.
        others: Further arguments, in front of the options.
        defaults: Returns the options' defaults.
    """

    def signature(_: type) -> inspect.Signature:
        hints = get_type_hints(options)
        known = defaults()
        named = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=known[name], annotation=hint
            )
            for name, hint in hints.items()
        ]
        return inspect.Signature([*others, *named])

    def decorate(cls: T) -> T:
        plain = inspect.cleandoc(cls.__doc__ or "")

        def docstring(owner: type) -> str | None:
            if owner is not cls:
                return None
            listed = "\n".join(
                textwrap.indent(f"{name}: {text}", "    ")
                for name, text in option_docs(options).items()
            )
            return f"{plain}\n\nArgs:\n{listed}" if listed else plain

        setattr(cls, "__signature__", _Computed(cls, signature))  # noqa: B010
        cls.__doc__ = _Computed(cls, docstring)  # type: ignore[assignment]
        return cls

    return decorate


@cache
def option_docs(options: type) -> dict[str, str]:
    """The docstring under each key of a `TypedDict`; empty where its source is not at hand."""
    docs: dict[str, str] = {}
    for base in getattr(options, "__orig_bases__", ()):
        docs |= option_docs(base) if isinstance(base, type) else {}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(options)))
    except (OSError, TypeError, SyntaxError):
        return docs
    (declared,) = tree.body
    assert isinstance(declared, ast.ClassDef)
    for key, text in zip(declared.body, declared.body[1:], strict=False):
        if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr):
            docs[ast.unparse(key.target)] = " ".join(ast.literal_eval(text.value).split())
    return docs


def refuse_positional(cls: type, values: tuple[Never, ...]) -> None:
    """Raise a `TypeError` for arguments without a name."""
    if values:
        raise TypeError(
            f"{cls.__name__} takes no positional arguments: pass them by name, the model as "
            f"{cls.__name__}(model=...)"
        )


class _Computed:
    """A class attribute that is computed when it is read."""

    def __init__(self, cls: type, compute: Callable[[type], Any]) -> None:
        self._cls = cls
        self._compute = compute

    def __get__(self, instance: object, owner: type) -> Any:
        if owner.__init__ is not self._cls.__init__:  # type: ignore[misc]
            raise AttributeError
        return self._compute(owner)
