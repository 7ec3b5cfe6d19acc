"""Settings that are read from the argument, then from a variable, then from their default."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Set
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from kalm_integrations.errors import ConfigurationError


class EnvironmentSettings(BaseModel):
    """All are checked together on construction; unknown arguments are refused.

    A subclass names its variables' prefix, and the fields that are arguments only.

    Raises:
        ConfigurationError: An argument is unknown, of a wrong type or value, or does not go with
            another; the message says which, where it is from, and what would do.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    variable_prefix: ClassVar[str]
    arguments_only: ClassVar[Set[str]] = frozenset()

    if not TYPE_CHECKING:  # type checkers and signatures show the arguments themselves

        def __init__(self, **arguments: Any) -> None:
            known = _names(type(self))
            wrong = ""
            variables: dict[str, str] = {}
            if unknown := arguments.keys() - known.keys() - set(known.values()):
                wrong = _unknown(min(unknown), known.values())
            else:
                variables = self._variables(arguments.keys())
                try:
                    super().__init__(**variables, **arguments)
                except ValidationError as error:
                    wrong = self._explain(error, variables)
            if wrong:
                # Tracebacks may show local variables, and these hold what may be secret; so do
                # pydantic's, which a chained error would bring along.
                arguments.clear()
                variables.clear()
                raise ConfigurationError(wrong)

        def __setattr__(self, name: str, value: Any) -> None:
            # pydantic's own error would show the value.
            if name in type(self).model_fields:
                raise AttributeError(f"{name} is fixed: construct another {type(self).__name__}")
            super().__setattr__(name, value)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy; with `update`, one that is constructed and checked anew."""
        if not update:
            return super().model_copy(deep=deep)
        fields = {name: getattr(self, name) for name in self._copied()}
        renamed = {argument: name for name, argument in _names(type(self)).items()}
        return type(self)(**fields | {renamed.get(name, name): update[name] for name in update})

    def _copied(self) -> Iterable[str]:
        """The fields that an updated copy takes over."""
        return type(self).model_fields

    @classmethod
    def variables(cls) -> dict[str, str]:
        """The variable of each field that may be read from one."""
        names = _names(_declaring(cls))
        read = sorted(names.keys() - cls.arguments_only)
        return {field: cls.variable_prefix + names[field].upper() for field in read}

    @classmethod
    def _variables(cls, given: Set[str]) -> dict[str, str]:
        """What the environment says of fields that are not `given`; empty is unset."""
        found = {
            field: os.environ.get(variable, "")
            for field, variable in cls.variables().items()
            if not given & {field, _names(cls)[field]}
        }
        return {name: value for name, value in found.items() if value}

    @classmethod
    def _explain(cls, error: ValidationError, variables: Mapping[str, str]) -> str:
        """What is wrong, argument by argument; values, which may be secret, are left out."""
        from_variables = {_names(cls)[field]: cls.variables()[field] for field in variables}
        wrong = []
        for item in error.errors(include_url=False, include_input=False, include_context=False):
            name = str(item["loc"][0]) if item["loc"] else ""
            message = item["msg"].removeprefix("Value error, ").removesuffix(".")
            # What concerns several arguments begins with the one that it is about.
            first = re.split(r"[=: ]", message, maxsplit=1)[0]
            about = name or first.removeprefix("--").replace("-", "_")  # an option, or an argument
            source = f" (from {from_variables[about]})" if about in from_variables else ""
            wrong.append(f"{name}{source}: {message}" if name else f"{message}{source}")
        return "; ".join(wrong) + "."


def _names(cls: type[BaseModel]) -> dict[str, str]:
    """Field → argument: the same, but where a framework has taken the name."""
    return {name: field.alias or name for name, field in cls.model_fields.items()}


def _declaring(cls: type[EnvironmentSettings]) -> type[EnvironmentSettings]:
    """The class whose fields have variables: a framework's own fields, further down, have none."""
    return next(
        base
        for base in reversed(cls.__mro__)
        if issubclass(base, EnvironmentSettings) and "variable_prefix" in vars(base)
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question to put behind a message, if there is a name like this one."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _unknown(name: str, known: Iterable[str]) -> str:
    hint = did_you_mean(name, known)
    return f"{name}: there is no such argument.{hint} There are {', '.join(known)}."
