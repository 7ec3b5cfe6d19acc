"""backend="modal": the app that `kalm deploy` made, over Modal's RPC.

Modal's client retries lost inputs and broken connections of its own accord; what it does not retry
(rate limits, containers that fail) is left to the one retry layer, in the session.
"""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kalm_integrations.errors import (
    ConfigurationError,
    ConnectionFailedError,
    ContainerFailedError,
    DeadlineExceededError,
    InvalidResponseError,
    KalmError,
    ModalTokenError,
    NotDeployedError,
    PermissionDeniedError,
    RateLimitError,
    RequestTooLargeError,
)
from kalm_integrations.extras import install_command
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.transports.http import HttpTransport
from kalm_integrations.wire import EmbedAnswer, EmbedRequest, read_error, request_fields, unpack

if TYPE_CHECKING:
    from kalm_integrations.settings import ClientSettings

T = TypeVar("T")


class ModalTransport:
    """Calls the class's packed method. Modal's own client, one a process, has the connections."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings

    async def embed(self, request: EmbedRequest) -> EmbedAnswer:
        reply = await self._call("embed_packed", request_fields(request))
        packed = reply.get("packed")
        if not isinstance(packed, bytes):
            raise InvalidResponseError("the answer of embed_packed has no packed vectors.")
        return unpack(packed)

    async def wake(self) -> SpaceIdentity | None:
        """Start a container if none runs, and ask it who it is."""
        return SpaceIdentity.from_dict((await self._call("describe"))["identity"])

    async def close(self) -> None:
        """Nothing: Modal's client is the process's."""

    async def _call(self, method: str, *arguments: Any) -> dict[str, Any]:
        called = getattr(deployed(self._settings), method)
        reply = await translated(called.remote.aio(*arguments), self._settings)
        if not isinstance(reply, dict):
            raise InvalidResponseError(f"{method} answered with {type(reply).__name__}.")
        if "error" in reply:
            raise read_error(reply["error"])
        return reply


class DiscoveredHttpTransport:
    """backend="http" without a base_url: the HTTP door of the app, whose address Modal knows."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._finding: asyncio.Task[HttpTransport] | None = None

    async def embed(self, request: EmbedRequest) -> EmbedAnswer:
        return await (await self._found()).embed(request)

    async def wake(self) -> SpaceIdentity | None:
        return await (await self._found()).wake()

    async def close(self) -> None:
        if self._finding is not None and not self._finding.cancel():
            await self._finding.result().close()

    async def _found(self) -> HttpTransport:
        finding = self._finding
        if finding is None or (finding.done() and finding.exception()):  # failed: ask afresh
            finding = self._finding = asyncio.create_task(self._find())
        return await asyncio.shield(finding)

    async def _find(self) -> HttpTransport:
        url = await http_url(self._settings)
        return HttpTransport(self._settings.model_copy(update={"base_url": url}))


def deployed(settings: ClientSettings) -> Any:
    """The deployed class's handle; asks nobody yet.

    Raises:
        ConfigurationError: Modal's package is missing.
    """
    try:
        import modal
    except ImportError as error:
        raise ConfigurationError(
            f'backend="modal" needs Modal\'s client: {install_command("modal")}.'
        ) from error
    return modal.Cls.from_name(
        settings.app_name, settings.modal_class, environment_name=settings.environment_name
    )()


async def http_url(settings: ClientSettings) -> str:
    """Where the app's HTTP door is. Starts no container.

    Raises:
        NotDeployedError: The app, its class or its HTTP door is not there.
    """
    url = await translated(deployed(settings).http.get_web_url.aio(), settings)
    if not url:
        raise NotDeployedError(f"{_place(settings)} has no HTTP door.")
    return str(url)


async def translated(work: Awaitable[T], settings: ClientSettings) -> T:
    """The result of Modal's client; what it raises, as ours.

    Raises:
        KalmError: Always one of these.
    """
    try:
        return await work
    except KalmError:
        raise
    except Exception as error:
        raise _error(error, settings) from error


_KINDS: Final[tuple[tuple[str, type[KalmError], str], ...]] = (
    ("AuthError", ModalTokenError, "Modal refused the token, or there is none"),
    ("NotFoundError", NotDeployedError, "{place} is not what this client needs"),
    ("PermissionDeniedError", PermissionDeniedError, "Modal forbids it"),
    ("ResourceExhaustedError", RateLimitError, "Modal's limit for the workspace"),
    ("FunctionTimeoutError", DeadlineExceededError, "the deployment's time limit for a call"),
    ("OutputExpiredError", DeadlineExceededError, "Modal no longer has the answer"),
    ("RequestSizeError", RequestTooLargeError, "Modal"),
    ("VersionError", ConfigurationError, "upgrade Modal's client ({install})"),
    ("ServiceError", ConnectionFailedError, "Modal was not reached"),
    ("InternalError", ConnectionFailedError, "Modal was not reached"),
    ("ConnectionError", ConnectionFailedError, "Modal was not reached"),
    ("OSError", ConnectionFailedError, "Modal was not reached"),
    # The packed method returns its errors. What is raised is not the method's: a container that
    # could not start, died, or has other code in it.
    ("Exception", ContainerFailedError, "a container of {place} failed"),
)
"""Modal's exception (or a builtin) → ours, and what it means. The first that fits."""


def _error(error: Exception, settings: ClientSettings) -> KalmError:
    from modal import exception as theirs

    kind, meaning = next(
        (ours, meaning)
        for name, ours, meaning in _KINDS
        if isinstance(error, getattr(theirs, name, None) or getattr(builtins, name))
    )
    said = str(error).strip().rstrip(".")
    meaning = meaning.format(place=_place(settings), install=install_command("modal"))
    return kind(f"{meaning}: {type(error).__name__}: {said}.")


def _place(settings: ClientSettings) -> str:
    where = f" in environment {settings.environment_name!r}" if settings.environment_name else ""
    return f"Modal app {settings.app_name!r}{where}, class {settings.modal_class!r}"
