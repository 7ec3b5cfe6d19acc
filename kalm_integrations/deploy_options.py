"""`kalm deploy`: every setting of the deployment is an option, checked where it is typed."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from kalm_integrations.argparsing import number, share

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from kalm_integrations.argparsing import Parser, Verbs


def add(verbs: Verbs) -> None:
    """Add the command."""
    parser = verbs.add_parser(
        "deploy",
        usage="kalm deploy [-h] [--OPTION [VALUE] ...]",
        help="deploy the service to Modal",
        description="Deploy the service to Modal. Each setting can be given as a variable too: "
        "KALM_DEPLOY_ and its name in capitals.",
    )
    parser.add_argument(
        "--accept-new-identity",
        action="store_true",
        help="replace a deployment of another vector space: its indexes must be embedded again",
    )
    parser.set_defaults(run=run, extra="modal")
    parser.prepare = partial(_add_settings, parser)


def run(arguments: argparse.Namespace) -> bool:
    """Deploy.

    Args:
        arguments: Those of `add`.

    Returns:
        True: what could fail raises.

    Raises:
        ConfigurationError: A setting cannot be, or the deployment would serve other vectors.
        ImportError: The extra "modal" is not installed.
        KalmError: Modal failed.
    """
    from modal_backend.deploy import deploy
    from modal_backend.settings import DeploySettings

    known = DeploySettings.model_fields
    given = {name: value for name, value in vars(arguments).items() if name in known}
    deploy(DeploySettings(**given), accept_new_identity=arguments.accept_new_identity)
    return True


def _add_settings(parser: Parser) -> None:
    # Not before this command is the one: no other shall need what settings import.
    from modal_backend.settings import SHORTEST_START, DeploySettings

    notes = {"startup_timeout": f"; with vLLM at least {SHORTEST_START}"}
    settings = parser.add_argument_group("settings", argument_default=argparse.SUPPRESS)
    for name, field in DeploySettings.model_fields.items():
        form = _form(field, notes.get(name, ""))
        help_ = [field.description or "", *form.pop("range", ())]
        if field.default is not None:
            help_.append(f"Default: {_shown(field.default)}.")
        settings.add_argument(
            f"--{name.replace('_', '-')}",
            help=" ".join(help_).replace("%", "%%"),
            **form,
        )


def _form(field: FieldInfo, note: str) -> dict[str, Any]:
    """What argparse is told of a setting: an error then names the option, and the range."""
    kind: Any = field.annotation
    kinds = (kind, *get_args(kind))
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if isinstance(field.json_schema_extra, dict):
        return {"choices": field.json_schema_extra["enum"]}
    if int in kinds:
        low, high = (
            next(getattr(limit, name) for limit in field.metadata if hasattr(limit, name))
            for name in ("ge", "le")
        )
        kind = number(low, high, note)
        return {"type": kind, "metavar": "N", "range": [f"From {low} to {high}."]}
    if float in kinds:
        return {"type": share, "metavar": "SHARE"}
    return {"metavar": "GPU,GPU" if get_origin(kind) is tuple else "NAME"}


def _shown(default: object) -> str:
    return ",".join(default) if isinstance(default, tuple) else str(default)
