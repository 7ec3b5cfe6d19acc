"""How `kalm` is used: one parser for all commands, one way to say that it was used wrongly.

An error is one line that names the option, what would do, and where to read on. argparse's own
would begin with all options of the command, a screen of them for `kalm deploy`.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kalm_integrations.environment import did_you_mean

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction["Parser"]

_SECRET = re.compile("key|token|secret|password")


class UsageError(Exception):
    """Arguments that cannot be understood.

    Attributes:
        command: Of which command, "kalm cost" for instance.
    """

    def __init__(self, command: str, message: str) -> None:
        super().__init__(message)
        self.command = command


class Parser(argparse.ArgumentParser):
    """Of `kalm` and of each of its commands.

    Attributes:
        prepare: Called before the first parsing: adds options whose import should not be paid by
            other commands.
    """

    prepare: Callable[[], None] | None = None

    def __init__(self, **settings: Any) -> None:
        # An abbreviation that works today is ambiguous with tomorrow's option.
        super().__init__(formatter_class=_Help, allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.prepare is not None:
            prepare, self.prepare = self.prepare, None
            prepare()
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:  # here, and not by `kalm`, which knows none of this command's options
            self.error(self._unknown(unknown))
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Raise what `kalm_integrations.cli.main` says and ends with.

        Raises:
            UsageError: Always.
        """
        choice = re.search(r"invalid choice: '?([^' ]*)'? \(choose from (.*)\)", message)
        hint = did_you_mean(choice[1], re.findall("[^', ]+", choice[2])) if choice else ""
        said = message.removeprefix("argument ") + (f".{hint}" if hint else "")
        if re.search("required: (COMMAND|WHAT)$", message):
            said = f"name one of {', '.join(self._verbs())}."
        raise UsageError(self.prog, said)

    def _verbs(self) -> list[str]:
        actions = self._subparsers._group_actions if self._subparsers else []
        return [verb for action in actions for verb in action.choices or ()]

    def _unknown(self, words: Sequence[str]) -> str:
        """Without values: one could be a key."""
        name = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
        if name is None:
            return f"{words[0]!r}: it takes no such argument"
        said = f"{name}: there is no such option.{did_you_mean(name, self._option_string_actions)}"
        if not _SECRET.search(name):
            return said
        return (
            f"{said} Keys are read from variables, such as KALM_API_KEY: an argument is seen by "
            "everybody who lists processes"
        )


class _Help(argparse.HelpFormatter):
    """Lists commands without a line for the word, indented as options are."""

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            return self._join_parts(map(self._format_action, action._get_subactions()))
        return super()._format_action(action)


def add_json(parser: Parser) -> None:
    """The option that every command with data has."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON document on stdout instead of text, also of an error",
    )


def number(low: int, high: int | None = None, note: str = "") -> Callable[[str], int]:
    """The type of an option that takes a whole number of a range.

    Args:
        low: The least.
        high: The most; None is no limit.
        note: Follows the range in an error.
    """

    def number(value: str) -> int:
        try:
            given = int(value)
        except ValueError:
            given = None
        if given is None or given < low or (high is not None and given > high):
            wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{value!r} is not a whole number {wanted}{note}")
        return given

    return number


def share(value: str) -> float:
    """The type of an option that takes a part of a whole."""
    try:
        given = float(value)
    except ValueError:
        given = math.nan
    if not 0 < given <= 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a share: above 0, and up to 1")
    return given


def path(value: str) -> Path:
    """The type of an option that names a file or a folder."""
    try:
        found = Path(value).expanduser()
        there = found.exists()
    except (OSError, RuntimeError) as error:  # a name too long; ~ of a user that is not there
        shown = value if len(value) < 100 else f"{value[:100]}…"
        why = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"{shown}: {why}") from None
    if not there:
        raise argparse.ArgumentTypeError(f"there is no {value}")
    return found
