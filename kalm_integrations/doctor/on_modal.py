"""What Modal knows without starting a container: token, app, tags, class, address."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from kalm_integrations.doctor import embedding
from kalm_integrations.doctor.checks import Check, Finding, Patient
from kalm_integrations.errors import NotDeployedError
from kalm_integrations.install_hints import install_command
from kalm_integrations.models import NAMED_SPACES
from kalm_integrations.transports.modal import deployed, http_url, translated
from kalm_integrations.version import __version__
from modal_backend.tags import DEPLOYABLE, IDENTITY_TAG, VERSION_TAG

T = TypeVar("T")
_METHODS: Final = ("embed_packed", "describe")
_NETWORK: Final = "Check this machine's network, and status.modal.com."
_REDEPLOY: Final = "Run `kalm deploy` again, with the options of last time."


def over_rpc(patient: Patient) -> list[Check]:
    """For backend="modal"."""
    container, *others = embedding.checks("container", patient, needs=("class", "app identity"))
    return [
        *_DEPLOYED,
        Check("class", _class, needs=("app",), silence=_NETWORK),
        Check("http endpoint", _endpoint_beside, needs=("class",), silence=_NETWORK),
        container,
        Check("start", _start, needs=("container",), wakes=True, silence=_NETWORK),
        *others,
    ]


def to_the_endpoint() -> list[Check]:
    """For backend="http" without a URL, up to the service's address."""
    needs = ("app", "app identity")
    return [*_DEPLOYED, Check("http endpoint", _endpoint, needs=needs, silence=_NETWORK)]


def _token(patient: Patient) -> Finding:
    patient.on_modal = True
    try:
        import modal
    except ImportError as error:
        return Finding.fail(f"Modal's client is not here: {error}", install_command("modal"))

    async def greet() -> None:
        client = await modal.Client.from_env.aio()
        await client.hello.aio()  # type: ignore[no-untyped-call]

    _ask(greet(), patient)
    variables = [n for n in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET") if os.environ.get(n)]
    path = os.environ.get("MODAL_CONFIG_PATH") or "~/.modal.toml"
    profile = os.environ.get("MODAL_PROFILE")
    file = f"{path}, profile {profile}" if profile else path
    return Finding.ok(f"accepted by Modal; from {' and '.join(variables) or file}")


def _app(patient: Patient) -> Finding:
    import modal

    settings = patient.settings

    async def look_up() -> dict[str, str]:
        app = await modal.App.lookup.aio(
            settings.app_name, environment_name=settings.environment_name
        )
        return dict(await app.get_tags.aio())

    patient.tags = _ask(look_up(), patient)
    return Finding.ok(f"{settings.app_name!r} is deployed in {_environment(patient)}")


def _version(patient: Patient) -> Finding:
    theirs = (patient.tags or {}).get(VERSION_TAG)
    if theirs == __version__:
        return Finding.ok(f"{theirs}, as this client")
    was = f"version {theirs}" if theirs else "something that tells no version"
    return Finding.warn(f"{was} is deployed, this client is {__version__}", _REDEPLOY)


def _identity(patient: Patient) -> Finding:
    """The tag is of what was to be deployed; what is loaded, only a container can tell."""
    tag, expected = (patient.tags or {}).get(IDENTITY_TAG), patient.settings.expected_space
    if tag is None:
        return Finding.warn("the deployment does not tell which vectors it serves", _REDEPLOY)
    served = DEPLOYABLE.get(tag)
    theirs = f"{served.model} ({tag})" if served else f"vectors of an identity unknown here ({tag})"
    if tag == expected.fingerprint:
        return Finding.ok(f"{theirs}, as expected")
    if served is None and not expected.declared:
        return Finding.warn(f"the deployment serves {theirs}", _REDEPLOY)
    adopt = ""
    if served is not None and served.model != expected.model:
        adopt = f" For {served.model} set KALM_MODEL={served.model}."
    elif served is not None:
        names = [name for name, space in NAMED_SPACES.items() if space == served]
        adopt = f" For {theirs} set KALM_EXPECTED_IDENTITY={names[0]}." if names else ""
    return Finding.fail(
        f"the deployment serves {theirs}, this client expects {expected.model} "
        f"({expected.fingerprint})",
        "Vectors of two spaces must not meet in one index: correct KALM_APP_NAME, KALM_MODEL or "
        f"KALM_EXPECTED_IDENTITY.{adopt}",
    )


def _class(patient: Patient) -> Finding:
    for method in _METHODS:
        _ask(_method(patient, method), patient)
    return Finding.ok(f"{patient.settings.class_name!r} has {', '.join(_METHODS)}")


def _endpoint(patient: Patient) -> Finding:
    patient.url = asyncio.run(http_url(patient.settings))
    return Finding.ok(patient.url)


def _endpoint_beside(patient: Patient) -> Finding:
    """For a client that does not use it."""
    try:
        _endpoint(patient)
    except NotDeployedError:
        return Finding.ok("none; this client calls over RPC and needs none")
    return Finding.ok(f"{patient.url}; this client calls over RPC and needs no key of it")


def _start(patient: Patient) -> Finding:
    """The phases of the running container's start, however long ago that was."""
    described = _ask(deployed(patient.settings).describe.remote.aio(), patient)
    phases = described.get("phases") if isinstance(described, dict) else None
    if not phases:
        return Finding.warn("the container does not tell how it started", _REDEPLOY)
    how = "not from a snapshot"
    if described.get("restored"):
        age = described.get("engine_age", 0.0)
        how = f"restored from a snapshot, {age:.0f} s after its engine was loaded"
    seconds = ", ".join(f"{phase} {taken:.1f} s" for phase, taken in phases.items())
    return Finding.ok(f"{seconds}; {how}")


_DEPLOYED: Final = (
    Check("token", _token, needs=("settings",), silence=_NETWORK),
    Check("app", _app, needs=("token",), silence=_NETWORK),
    Check("app version", _version, needs=("app",)),
    Check("app identity", _identity, needs=("app",)),
)


def _ask(question: Coroutine[Any, Any, T], patient: Patient) -> T:
    """What Modal answers; starts no container.

    Raises:
        KalmError: Modal refuses, has no such thing, or was not reached.
    """
    return asyncio.run(translated(question, patient.settings))


async def _method(patient: Patient, name: str) -> None:
    await getattr(deployed(patient.settings), name).hydrate.aio()


def _environment(patient: Patient) -> str:
    name = patient.settings.environment_name or os.environ.get("MODAL_ENVIRONMENT")
    return f"environment {name!r}" if name else "the token's own environment"
