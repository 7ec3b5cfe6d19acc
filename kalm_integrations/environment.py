"""Settings, each read from its argument, then its environment variable, then its default."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable, Mapping, Set
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from kalm_integrations.errors import ConfigurationError


class EnvironmentSettings(BaseModel):
    """Base class: validates all settings together on construction; refuses unknown arguments.

    A subclass names its variables' prefix, and the fields that are arguments only.

    Raises:
        ConfigurationError: An argument is unknown, has a wrong type or value, or contradicts
            another. The message names the argument, its source and the remedy.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, protected_namespaces=()
    )

    variable_prefix: ClassVar[str]
    arguments_only: ClassVar[Set[str]] = frozenset()
    protected_fields: ClassVar[tuple[str, ...]] = ()
    """An update may replace their values, but not contradict them."""

    if not TYPE_CHECKING:  # type checkers see the arguments themselves

        def __init__(self, **arguments: Any) -> None:
            self._check_arguments(arguments, arguments)
            self._validate(arguments, self._variables(arguments))

        def __setattr__(self, name: str, value: Any) -> None:
            # pydantic's own error would show the value.
            if name in type(self).model_fields:
                raise AttributeError(f"{name} is fixed: construct another {type(self).__name__}")
            super().__setattr__(name, value)

    @classmethod
    def contradicted_by(cls, name: str, value: Any) -> Collection[str]:
        """Names of the arguments that contradict argument `name` with this `value`."""
        return ()

    @classmethod
    def variables(cls) -> dict[str, str]:
        """The environment variable of each field that can be set by one."""
        names = sorted(cls.model_fields.keys() - cls.arguments_only)
        return {name: cls.variable_prefix + name.upper() for name in names}

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy; with `update`, one that is validated like any other."""
        if not update:
            return super().model_copy(deep=deep)
        changes, update = dict(update), None
        protected = {name: getattr(self, name) for name in self.protected_fields}
        self._check_arguments(changes, protected | changes)
        fields = {name: getattr(self, name) for name in self.model_fields_set} | changes
        changes.clear()
        copied = type(self).__new__(type(self))
        copied._validate(fields, {})
        return copied

    def _validate(self, arguments: dict[str, Any], variables: dict[str, str]) -> None:
        message = ""
        try:
            BaseModel.__init__(self, **variables, **arguments)
        except ValidationError as error:
            message = explain(error, {name: self.variables()[name] for name in variables})
        if message:
            # Tracebacks may show local variables, and these hold what may be secret; so do
            # pydantic's, which a chained error would bring along.
            arguments.clear()
            variables.clear()
            self.__dict__.clear()
            raise ConfigurationError(message)

    @classmethod
    def _check_arguments(cls, arguments: dict[str, Any], together: dict[str, Any]) -> None:
        """Refuse unknown names in `arguments`, and those that contradict others `together`."""
        fields, message = cls.model_fields, ""
        if unknown := arguments.keys() - fields.keys():
            message = unknown_argument(min(unknown), fields)
        else:
            # A default value counts as absent.
            present = [name for name in together if together[name] != fields[name].default]
            pairs = (
                (name, other)
                for name in present
                for other in cls.contradicted_by(name, together[name])
                if other in present
            )
            if pair := next(pairs, None):
                message = "{}= and {}= contradict each other: leave one of them out.".format(*pair)
        if message:
            arguments.clear()
            together.clear()
            raise ConfigurationError(message)

    @classmethod
    def _variables(cls, arguments: Mapping[str, Any]) -> dict[str, str]:
        """The environment's values for fields that `arguments` leave open; empty is unset."""
        values = {
            name: value
            for name, variable in cls.variables().items()
            if name not in arguments and (value := os.environ.get(variable, ""))
        }
        excluded = {
            other for name, value in arguments.items() for other in cls.contradicted_by(name, value)
        }
        return {
            name: value
            for name, value in values.items()
            if name not in excluded
            and not any(
                arguments.get(other) is not None for other in cls.contradicted_by(name, value)
            )
        }


def explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    """Describe what is wrong, argument by argument, without values: those may be secret.

    Args:
        error: pydantic's.
        sources: The variable that each argument was read from, if it was.
    """
    messages = []
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        name = str(item["loc"][0]) if item["loc"] else ""
        message = item["msg"].removeprefix("Value error, ").removesuffix(".")
        # What concerns several arguments begins with the one that it is about.
        first = re.split(r"[=: ]", message, maxsplit=1)[0]
        about = name or first.removeprefix("--").replace("-", "_")  # an option, or an argument
        source = f" (from {sources[about]})" if about in sources else ""
        messages.append(f"{name}{source}: {message}" if name else f"{message}{source}")
    return "; ".join(messages) + "."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question for the end of a message, if one of `known` is similar to `name`."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def unknown_argument(name: str, known: Iterable[str]) -> str:
    """Return the message for an argument that does not exist."""
    known = list(known)
    hint = did_you_mean(name, known)
    return f"{name}: there is no such argument.{hint} There are {', '.join(known)}."
