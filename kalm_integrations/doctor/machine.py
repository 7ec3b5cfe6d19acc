"""Checks of this machine: Python, packages, variables, settings. They send nothing."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from packaging.requirements import Requirement
from pydantic import SecretStr

from kalm_integrations import version as ours
from kalm_integrations.doctor.base import Check, DoctorContext, Result, fail, is_redacted, warn
from kalm_integrations.environment import did_you_mean
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.install_hints import NAME

if TYPE_CHECKING:
    from kalm_integrations.config import ClientConfig

_EXTRAS: Final = ("", "langchain", "llama-index", "modal")
"""The core, whose packages must be there, and extras that are checked where they are installed."""
_CHOOSE: Final = (
    "Set KALM_BASE_URL for a server, run `modal setup` for Modal, or set KALM_BACKEND=local for "
    "the small model in this process."
)
_CORRECT: Final = (
    "Correct the variables that are named there; docs/arguments.md lists what each argument takes, "
    "and KALM_ and its name in capitals is its variable."
)
_SHOWN: Final = 60  # characters of a variable's value


def python(_: DoctorContext) -> Result:
    """Which Python, and which copy of this package."""
    system = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return f"{system}, {NAME} {ours.__version__} in {Path(ours.__file__).parent}"


def packages(_: DoctorContext) -> Result:
    """The installed packages, against this package's metadata."""
    try:
        declared = [Requirement(line) for line in requires(NAME) or []]
    except PackageNotFoundError:
        return warn(
            f"{NAME} is on the path but not installed: its requirements are unknown",
            "Install it with pip, so that pip keeps its packages in order.",
        )
    installed, wrong, install = [], [], []
    for needed in declared:
        optional = needed.marker is not None and not needed.marker.evaluate({"extra": ""})
        if needed.marker and not any(needed.marker.evaluate({"extra": e}) for e in _EXTRAS):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            if optional:
                continue
            found = ""
        if found and needed.specifier.contains(found, prereleases=True):
            installed.append(f"{needed.name} {found}")
        else:
            wrong.append(f"{needed.name} {found or 'is missing'} (needs {needed.specifier})")
            install.append(f"'{needed.name}{needed.specifier}'")
    if wrong:
        return fail(", ".join(wrong), f"pip install {' '.join(install)}")
    return ", ".join(dict.fromkeys(installed))


def variables(_: DoctorContext) -> Result:
    """KALM_* variables that nothing reads."""
    from kalm_integrations.config import ClientConfig
    from modal_backend.http.auth import FILE_VARIABLE
    from modal_backend.settings import DeploySettings

    known = [*ClientConfig.variables().values(), *DeploySettings.variables().values()]
    known.append(FILE_VARIABLE)
    given = [name for name, value in os.environ.items() if value and name[:5].upper() == "KALM_"]
    unread = sorted(name for name in given if name not in known)
    if not unread:
        return f"{len(given)} KALM_* set, no misspelt name" if given else "none is set"
    hints = {name: did_you_mean(name.upper(), known).removesuffix("?") for name in unread}
    hint = "".join(f"{hint.strip()} for {name}? " for name, hint in hints.items() if hint)
    return warn(f"nothing reads {', '.join(unread)}", f"{hint}docs/arguments.md lists all.")


def settings(context: DoctorContext) -> Result:
    """What `KalmClient()` makes of the variables."""
    from kalm_integrations.backends import NO_BACKEND
    from kalm_integrations.config import ClientConfig

    try:
        context.config = config = ClientConfig(**context.arguments)
    except ConfigurationError as error:
        return fail(error.message, _CHOOSE if NO_BACKEND in str(error) else _CORRECT)
    reason = "Modal's client and a token are here, and no KALM_BASE_URL"
    if "backend" in context.arguments:
        reason = "the deployment is checked"
    elif config.backend != "auto":
        reason = "KALM_BACKEND says so"
    elif config.base_url is not None:
        reason = "KALM_BASE_URL is set"
    chosen = f'backend="{config.resolved_backend}", since {reason}; model {config.served_model}'
    return "\n".join([chosen, *_values(config)])


def _values(config: ClientConfig) -> Iterator[str]:
    """The variables that are set; of secrets, that they are."""
    for field, name in config.variables().items():
        value, secret = os.environ.get(name), getattr(config, field)
        if SecretStr in get_args(type(config).model_fields[field].annotation):
            if isinstance(secret, SecretStr):
                plain = not is_redacted(secret.get_secret_value())
                yield f"{name}: set{', to something so plain that it is not redacted' * plain}"
            elif config.resolved_backend == "http":
                yield f"{name}: not set"
        elif value:
            yield f"{name}={value if len(value) <= _SHOWN else value[:_SHOWN] + '…'}"


CHECKS: Final = (
    Check("python", python),
    Check("packages", packages),
    Check("variables", variables),
    Check("settings", settings),
)
