"""Checks of what Modal knows without starting a container: token, app, tags, class, address."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from kalm_integrations.doctor import service
from kalm_integrations.doctor.base import Check, DoctorContext, Result, fail, warn
from kalm_integrations.errors import NotDeployedError
from kalm_integrations.install_hints import install_command
from kalm_integrations.transports.modal import deployed, http_url, translated
from kalm_integrations.version import __version__
from modal_backend.tags import DEPLOYABLE, IDENTITY_TAG, VERSION_TAG

T = TypeVar("T")
_METHODS: Final = ("embed_packed", "describe")
_NETWORK: Final = "Check this machine's network, and status.modal.com."
_REDEPLOY: Final = "Run `kalm deploy` again, with the same options as before."


def checks(context: DoctorContext) -> list[Check]:
    """For backend="modal", and up to the service's address for backend="http"."""
    rpc = context.settings.resolved_backend == "modal"
    looks = [
        ("token", _token, "settings"),
        ("app", _app, "token"),
        ("app version", _version, "app"),
        ("app identity", _identity, "app"),
        *([("class", _class, "app")] if rpc else []),
        ("http endpoint", _endpoint, "class" if rpc else "app identity"),
    ]
    cold = [Check(name, look, (need,), no_answer=_NETWORK) for name, look, need in looks]
    if not rpc:
        return cold
    container, *others = service.checks("container", context, "class", "app identity")
    start = Check("start", _start, ("container",), wakes=True, no_answer=_NETWORK)
    return [*cold, container, start, *others]


def _token(context: DoctorContext) -> Result:
    context.scales_to_zero = True
    try:
        import modal
    except ImportError as error:
        return fail(f"Modal's client is missing: {error}", install_command("modal"))

    async def greet() -> None:
        client = await modal.Client.from_env.aio()
        await client.hello.aio()  # type: ignore[no-untyped-call]

    _ask(greet(), context)
    variables = [n for n in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET") if os.environ.get(n)]
    file = os.environ.get("MODAL_CONFIG_PATH") or "~/.modal.toml"
    return f"accepted by Modal; from {' and '.join(variables) or file}"


def _app(context: DoctorContext) -> Result:
    import modal

    name, environment = context.settings.app_name, context.settings.environment_name

    async def look_up() -> dict[str, str]:
        app = await modal.App.lookup.aio(name, environment_name=environment)
        return dict(await app.get_tags.aio())

    context.tags = _ask(look_up(), context)
    environment = environment or os.environ.get("MODAL_ENVIRONMENT")
    where = f"environment {environment!r}" if environment else "the token's own environment"
    return f"{name!r} is deployed in {where}"


def _version(context: DoctorContext) -> Result:
    theirs = (context.tags or {}).get(VERSION_TAG)
    if theirs == __version__:
        return f"{theirs}, as this client"
    version = f"version {theirs}" if theirs else "an unknown version"
    return warn(f"{version} is deployed, this client is {__version__}", _REDEPLOY)


def _identity(context: DoctorContext) -> Result:
    """The tag tells what was to be deployed; only a container can tell what is loaded."""
    tag, expected = (context.tags or {}).get(IDENTITY_TAG), context.settings.expected_space
    if tag is None:
        return warn("the deployment does not tell which vectors it serves", _REDEPLOY)
    served = DEPLOYABLE.get(tag)
    theirs = f"{served.model if served else 'an unknown model'}, space {tag}"
    if tag == expected.fingerprint:
        return f"{theirs}, as expected"
    if served is None and not expected.declared:
        return warn(f"the deployment serves {theirs}", _REDEPLOY)
    return fail(
        f"the deployment serves {theirs}; this client expects {expected.model}, space "
        f"{expected.fingerprint}",
        service.mismatch_remedy(served, expected),
    )


def _class(context: DoctorContext) -> Result:
    async def look_up(method: str) -> None:
        await getattr(deployed(context.settings), method).hydrate.aio()

    for method in _METHODS:
        _ask(look_up(method), context)
    return f"{context.settings.class_name!r} has {', '.join(_METHODS)}"


def _endpoint(context: DoctorContext) -> Result:
    rpc = context.settings.resolved_backend == "modal"
    try:
        context.url = asyncio.run(http_url(context.settings))
    except NotDeployedError:
        if not rpc:
            raise
        return "none; this client calls over RPC and needs none"
    return context.url + "; this client calls over RPC and needs no key of it" * rpc


def _start(context: DoctorContext) -> Result:
    """The phases of the running container's start, however long ago that was."""
    described = _ask(deployed(context.settings).describe.remote.aio(), context)
    phases = described.get("phases") if isinstance(described, dict) else None
    if not phases:
        return warn("the container does not tell how it started", _REDEPLOY)
    origin = "not from a snapshot"
    if described.get("restored"):
        age = described.get("engine_age", 0.0)
        origin = f"restored from a snapshot, {age:.0f} s after its engine was loaded"
    seconds = ", ".join(f"{phase} {duration:.1f} s" for phase, duration in phases.items())
    return f"{seconds}; {origin}"


def _ask(question: Coroutine[Any, Any, T], context: DoctorContext) -> T:
    """Modal's answer; starts no container.

    Raises:
        KalmError: Modal refuses, has no such thing, or was not reached.
    """
    return asyncio.run(translated(question, context.settings))
