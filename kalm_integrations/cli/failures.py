"""What the user reads when a command fails: what happened, what to do next, the exit status."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple, Self

from cyclopts import App, CycloptsError

from kalm_integrations.errors import (
    ConfigurationError,
    InvalidInputError,
    KalmError,
    NotDeployedError,
)
from kalm_integrations.install_hints import install_command

WRONG_USAGE: Final = 2
_SECRET: Final = re.compile("key|token|secret|password")


class MissingPackageError(Exception):
    """A package that the command needs is not installed.

    Attributes:
        extra: The extra that installs it.
    """

    def __init__(self, message: str, extra: str) -> None:
        super().__init__(message)
        self.extra = extra


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Report a failed import in this block as the missing `extra`.

    Raises:
        MissingPackageError: An import failed.
    """
    try:
        yield
    except ImportError as error:
        raise MissingPackageError(str(error), extra) from error


class Failure(NamedTuple):
    """Why a command could not do its work.

    Attributes:
        code: Of docs/errors.md, or "missing_package", "os_error", "interrupted".
        message: What happened; a sentence.
        remedy: What to do next; empty where nobody knows.
        exit_status: Of the process.
    """

    code: str
    message: str
    remedy: str
    exit_status: int

    @classmethod
    def of(cls, error: Exception, command: str) -> Self:
        """Describe an error of `command`, "kalm cost" for instance."""
        failure = cls("internal_error", f"{type(error).__name__}: {error}", "Please report it.", 1)
        if isinstance(error, CycloptsError):
            cause = _configuration_error(error)
            message = _with_option(cause.message) if cause else _usage(error)
            remedy = f"`{command} --help` lists the options."
            failure = cls(ConfigurationError.code, message, remedy, WRONG_USAGE)
        elif isinstance(error, KalmError):
            wrong_usage = isinstance(error, ConfigurationError | InvalidInputError)
            remedy = _remedy(error, command)
            status = WRONG_USAGE if wrong_usage else 1
            failure = cls(error.code, error.message, remedy, status)
        elif isinstance(error, MissingPackageError):
            failure = cls("missing_package", str(error), f"Run {install_command(error.extra)}", 1)
        elif isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            failure = cls("os_error", f"{where}{error.strerror or error}", "", 1)
        ended = failure.message.endswith((".", "?", "!"))
        return failure if ended else failure._replace(message=f"{failure.message}.")


def missing_command(app: App) -> ConfigurationError:
    """The error of `kalm` and of `kalm eval` without a command."""
    names = [name for name in app if not name.startswith("-")]
    return ConfigurationError(f"name a command: {', '.join(names)}.")


def _configuration_error(error: CycloptsError) -> ConfigurationError | None:
    """What our own settings refused, if they are the cause."""
    from pydantic import ValidationError

    if not isinstance(error.__cause__, ValidationError):
        return None
    cause = error.__cause__.errors()[0].get("ctx", {}).get("error")
    return cause if isinstance(cause, ConfigurationError) else None


def _with_option(message: str) -> str:
    """A message about a setting, with the option in place of the field's name."""
    return re.sub(r"^\w+(?=[:=])", lambda name: f"--{name[0].replace('_', '-')}", message)


def _usage(error: CycloptsError) -> str:
    message = str(error)
    unknown = re.match(r"Unknown option: (--?[^\s=.]+)", message)
    if unknown and _SECRET.search(unknown[1]):
        message += (
            " Keys are read from variables, such as KALM_API_KEY: everybody who lists processes "
            "sees arguments."
        )
    return message


def _remedy(error: KalmError, command: str) -> str:
    """What to do on the command line, where the error's own remedy speaks of Python arguments."""
    if isinstance(error, NotDeployedError):
        from kalm_integrations.doctor.base import NOT_DEPLOYED

        return NOT_DEPLOYED
    if error.remedy != ConfigurationError.remedy:
        return error.remedy
    if re.match("--|INPUT|name a command", error.message):
        return f"`{command} --help` lists the options."
    return "`kalm doctor` checks all variables." if "KALM_" in error.message else ""
