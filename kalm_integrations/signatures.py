"""Signatures and docstrings of classes whose arguments are `TypedDict`s.

Type checkers read `**options: Unpack[ClientOptions]`. `help()` and `inspect.signature` do not:
`documented` lists every argument for them, from the same place, when they need it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Never, TypeVar, get_type_hints

T = TypeVar("T", bound=type)


def documented(*options: type, defaults: Callable[[], Mapping[str, Any]]) -> Callable[[T], T]:
    """Give a class the signature and the docstring that list its arguments.

    Args:
        options: `TypedDict`s with a docstring under each key, without their bases.
        defaults: Returns the default of each argument.
    """

    def signature() -> inspect.Signature:
        known = defaults()
        return inspect.Signature(
            [
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=known[name],
                    annotation=get_type_hints(each)[name],
                )
                for each in options
                for name in each.__annotations__
            ]
        )

    def decorate(cls: T) -> T:
        summary = inspect.cleandoc(cls.__doc__ or "")

        def docstring() -> str:
            lines = [f"    {name}: {text}" for each in options for name, text in _docs(each)]
            return "\n".join([summary, "", "Args:", *lines])

        setattr(cls, "__signature__", _Computed(cls, signature))  # noqa: B010
        setattr(cls, "__doc__", _Computed(cls, docstring))  # noqa: B010
        return cls

    return decorate


def _docs(options: type) -> list[tuple[str, str]]:
    """The keys of a `TypedDict`, with their docstrings; empty where its source is missing."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(options)))
    except OSError:
        return []
    (declared,) = tree.body
    assert isinstance(declared, ast.ClassDef)
    return [
        (ast.unparse(key.target), " ".join(ast.literal_eval(text.value).split()))
        for key, text in zip(declared.body, declared.body[1:], strict=False)
        if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr)
    ]


def refuse_positional(cls: type, values: tuple[Never, ...]) -> None:
    """Raise a `TypeError` for arguments without a name."""
    if values:
        raise TypeError(
            f"{cls.__name__} takes no positional arguments: pass them by name, the model as "
            f"{cls.__name__}(model=...)"
        )


class _Computed:
    """A class attribute, computed when it is read; subclasses with other arguments lack it."""

    def __init__(self, cls: type, compute: Callable[[], Any]) -> None:
        self._cls = cls
        self._compute = compute

    def __get__(self, instance: object, owner: type) -> Any:
        if owner.__init__ is not self._cls.__init__:  # type: ignore[misc]
            raise AttributeError
        return self._compute()
