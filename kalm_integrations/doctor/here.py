"""This machine: Python, packages, variables, settings. Asks nobody."""

from __future__ import annotations

import difflib
import operator
import os
import platform
import re
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from pydantic import SecretStr

from kalm_integrations import version as ours
from kalm_integrations.doctor.checks import Check, Finding, Patient
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.install_hints import NAME

if TYPE_CHECKING:
    from kalm_integrations.config import ClientConfig

_EXTRAS: Final = ("langchain", "llama-index", "modal")
"""Whose packages are looked at where they are installed; the core's must be."""

_OPERATORS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
}
_CHOOSE: Final = (
    "Set KALM_BASE_URL for a server, run `modal setup` for Modal, or set KALM_BACKEND=local for "
    "the small model in this process."
)
_CORRECT: Final = (
    "Correct the variables that are named there; the README lists what each argument takes, and "
    "KALM_ and its name in capitals is its variable."
)
_SHOWN: Final = 60  # characters of a variable's value


def python(_: Patient) -> Finding:
    """Which one it is, and which copy of this package."""
    here = Path(ours.__file__).parent
    machine = f"{platform.system()} {platform.machine()}"
    return Finding.ok(
        f"{platform.python_version()} on {machine}, {NAME} {ours.__version__} in {here}"
    )


def packages(_: Patient) -> Finding:
    """Those that this package uses, against its own metadata."""
    try:
        declared = requires(NAME) or []
    except PackageNotFoundError:
        return Finding.warn(
            f"{NAME} is on the path but not installed: no versions to compare with",
            "Install it with pip, so that pip keeps its packages in order.",
        )
    shown, wrong, install = [], [], []
    for package, bounds, extra in _requirements(declared):
        try:
            found = version(package)
        except PackageNotFoundError:
            if extra:
                continue
            found = ""
        if found and all(_OPERATORS[how](_release(found), _release(to)) for how, to in bounds):
            shown.append(f"{package} {found}")
            continue
        wanted = ",".join(how + to for how, to in bounds)
        wrong.append(f"{package} {found or 'is missing'} (needs {wanted})")
        install.append(f"'{package}{wanted}'")
    if wrong:
        return Finding.fail(", ".join(wrong), f"pip install {' '.join(install)}")
    return Finding.ok(", ".join(shown))


def variables(_: Patient) -> Finding:
    """Names that nobody reads."""
    from kalm_integrations.config import ClientConfig
    from modal_backend.settings import DeploySettings

    known = [*ClientConfig.variables().values(), *DeploySettings.variables().values()]
    given = sorted(
        name for name, value in os.environ.items() if value and name.upper().startswith("KALM_")
    )
    unread = [name for name in given if name not in known]
    if not unread:
        return Finding.ok(f"{len(given)} KALM_* set, no misspelt name" if given else "none is set")
    near = {name: difflib.get_close_matches(name.upper(), known, n=1) for name in unread}
    meant = [f"{match} for {name}" for name, (match, *_) in near.items() if match]
    hint = f"Did you mean {', '.join(meant)}? " if meant else ""
    return Finding.warn(
        f"nothing reads {', '.join(unread)}", f"{hint}The README lists all arguments."
    )


def settings(patient: Patient) -> Finding:
    """What `KalmClient()` makes of them."""
    from kalm_integrations.backends import NO_BACKEND
    from kalm_integrations.config import ClientConfig

    try:
        patient.configured = made = ClientConfig()
    except ConfigurationError as error:
        return Finding.fail(error.message, _CHOOSE if NO_BACKEND in str(error) else _CORRECT)
    return Finding.ok("\n".join([_backend(made), *_shown(made)]))


HERE: Final = (
    Check("python", python),
    Check("packages", packages),
    Check("variables", variables),
    Check("settings", settings),
)


def _backend(made: ClientConfig) -> str:
    if made.backend != "auto":
        why = "KALM_BACKEND says so"
    elif made.base_url is not None:
        why = "KALM_BASE_URL is set"
    else:
        why = "Modal's client and a token are here, and no KALM_BASE_URL"
    return f'backend="{made.resolved_backend}", since {why}; model {made.served_model}'


def _shown(made: ClientConfig) -> Iterator[str]:
    """The variables that are set; of secrets, that they are."""
    names = made.variables()
    secret = [
        field
        for field, info in type(made).model_fields.items()
        if SecretStr in get_args(info.annotation)
    ]
    for field, name in names.items():
        value = os.environ.get(name)
        if field in secret:
            if made.resolved_backend == "http" or getattr(made, field) is not None:
                yield f"{name}: {'not set' if getattr(made, field) is None else 'set'}"
        elif value:
            yield f"{name}={value if len(value) <= _SHOWN else value[:_SHOWN] + '…'}"


def _requirements(declared: list[str]) -> Iterator[tuple[str, list[tuple[str, str]], str]]:
    """Package, bounds, extra; each once, of the core and of the extras that matter."""
    seen = set()
    for line in declared:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra *== *['\"](.+?)['\"]", marker)
        of = extra[1] if extra else ""
        parts = re.match(r"([\w.-]+)(?:\[.*?\])?(.*)", requirement.strip())
        if parts is None or (of and of not in _EXTRAS) or parts[1] in seen:
            continue
        seen.add(parts[1])
        bounds = re.findall(r"(>=|==|<)\s*([\w.]+)", parts[2])
        yield parts[1], bounds, of


def _release(number: str) -> tuple[int, ...]:
    """The numbers of a version; what follows them, "rc1" or "+cu128", decides nothing here."""
    numbers = re.match(r"\d+(\.\d+)*", number)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()
