"""backend="modal": the app that `kalm deploy` made, over Modal's RPC.

Modal's client retries lost inputs and broken connections of its own accord; what it does not retry
(rate limits, containers that fail) is left to the one retry layer, in the session.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kalm_integrations.codec import (
    EmbedAnswer,
    EmbedRequest,
    ServiceWarning,
    read_error,
    read_warnings,
    request_fields,
    unpack,
)
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
    without_sign_in_advice,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.install_hints import install_command
from kalm_integrations.transports.http import HttpTransport

if TYPE_CHECKING:
    from kalm_integrations.options import ClientConfig

T = TypeVar("T")


class ModalTransport:
    """Calls the class's packed method. Modal's own client, one a process, has the connections."""

    may_be_cold = True
    may_rest = False
    reports_no_identity = False

    def __init__(self, settings: ClientConfig) -> None:
        self._settings = settings
        self._methods: dict[str, Any] = {}
        """Looked up once: it takes two calls of Modal's servers."""
        self.service_warnings: tuple[ServiceWarning, ...] = ()

    async def embed(self, request: EmbedRequest) -> EmbedAnswer:
        reply = await self._call("embed_packed", request_fields(request))
        packed = reply.get("packed")
        if not isinstance(packed, bytes):
            raise InvalidResponseError("the answer of embed_packed has no packed vectors.")
        return unpack(packed)

    async def wake(self) -> SpaceIdentity | None:
        """Start a container if none runs, and ask it who it is."""
        reply = await self._call("describe")
        self.service_warnings = read_warnings(reply)
        try:
            return SpaceIdentity.from_dict(reply["identity"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidResponseError(f"describe told no identity: {error}.") from error

    async def close(self) -> None:
        """Nothing: Modal's client is the process's."""

    async def _call(self, method: str, *arguments: Any) -> dict[str, Any]:
        known = method in self._methods
        try:
            reply = await translated(self._remote(method, arguments), self._settings)
        except KalmError as error:
            self._methods.pop(method, None)
            if known and isinstance(error, NotDeployedError):  # it may be deployed anew since
                return await self._call(method, *arguments)
            raise
        if not isinstance(reply, dict):
            raise InvalidResponseError(f"{method} answered with {type(reply).__name__}.")
        if "error" in reply:
            raise read_error(reply["error"])
        return reply

    async def _remote(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if method not in self._methods:
            self._methods[method] = await self._looked_up(method)
        try:
            return await self._methods[method].remote.aio(*arguments)
        except KalmError as error:  # a hook's: the method returns its own
            raise ContainerFailedError(
                f"a container of {_place(self._settings)} failed: {type(error).__name__}: {error}"
            ) from error

    async def _looked_up(self, method: str) -> Any:
        found = getattr(deployed(self._settings), method)
        async with _reached(self._settings):
            await found.hydrate.aio()
        return found


class DiscoveredHttpTransport:
    """backend="http" without a base_url: the HTTP door of the app, whose address Modal knows."""

    may_be_cold = True
    may_rest = False
    reports_no_identity = False  # it is our app

    def __init__(self, settings: ClientConfig) -> None:
        self._settings = settings
        self._finding: asyncio.Task[HttpTransport] | None = None
        self.service_warnings: tuple[ServiceWarning, ...] = ()

    async def embed(self, request: EmbedRequest) -> EmbedAnswer:
        return await (await self._found()).embed(request)

    async def wake(self) -> SpaceIdentity | None:
        transport = await self._found()
        identity = await transport.wake()
        self.service_warnings = transport.service_warnings
        return identity

    async def close(self) -> None:
        finding, self._finding = self._finding, None
        if finding is None or finding.cancel() or finding.exception():
            return
        await finding.result().close()

    async def _found(self) -> HttpTransport:
        finding = self._finding
        if finding is None or (finding.done() and finding.exception()):  # failed: ask afresh
            finding = self._finding = asyncio.create_task(self._find())
        return await asyncio.shield(finding)

    async def _find(self) -> HttpTransport:
        url = await http_url(self._settings)
        return HttpTransport(self._settings.model_copy(update={"base_url": url}))


def deployed(settings: ClientConfig) -> Any:
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
    _leave_parents_channels_alone()
    hpack = logging.getLogger("hpack")  # under Modal's client; its DEBUG lines show the token
    if hpack.level < logging.INFO:
        hpack.setLevel(logging.INFO)
    return modal.Cls.from_name(
        settings.app_name, settings.class_name, environment_name=settings.environment_name
    )()


async def http_url(settings: ClientConfig) -> str:
    """Where the app's HTTP door is. Starts no container.

    Raises:
        NotDeployedError: The app, its class or its HTTP door is not there.
    """
    async with _reached(settings):
        url = await translated(deployed(settings).http.get_web_url.aio(), settings)
    if not url:
        raise NotDeployedError(f"{_place(settings)} has no HTTP door.")
    return str(url)


@asynccontextmanager
async def _reached(settings: ClientConfig) -> AsyncIterator[None]:
    """Left alone, Modal's client tries to connect for a minute."""
    limit = settings.connect_timeout
    try:
        async with asyncio.timeout(limit) as timer:
            yield
    except TimeoutError as error:
        if not timer.expired():
            raise
        message = f"Modal was not reached within connect_timeout={limit:g} s."
        raise ConnectionFailedError(message) from error


async def translated(work: Awaitable[T], settings: ClientConfig) -> T:
    """The result of Modal's client; what it raises, as ours.

    Raises:
        KalmError: Always one of these.
    """
    try:
        return await work
    except KalmError:
        raise
    except Exception as error:
        raise error_of(error, settings) from error


_KINDS: Final[tuple[tuple[str, type[KalmError], str], ...]] = (
    ("AuthError", ModalTokenError, "Modal refused the token, or there is none"),
    ("NotFoundError", NotDeployedError, "{place} is not what this client needs"),
    ("PermissionDeniedError", PermissionDeniedError, "Modal forbids it"),
    ("ResourceExhaustedError", RateLimitError, "Modal's limit for the workspace"),
    (
        "FunctionTimeoutError",
        DeadlineExceededError,
        "over the deployment's time limit for a call, which `kalm deploy --timeout` raises",
    ),
    ("OutputExpiredError", DeadlineExceededError, "Modal no longer has the answer"),
    ("RequestSizeError", RequestTooLargeError, "Modal"),
    ("VersionError", ConfigurationError, "upgrade Modal's client ({install})"),
    ("InvalidError", ConfigurationError, "Modal refused the call"),
    ("ServiceError", ConnectionFailedError, "Modal was not reached"),
    ("InternalError", ConnectionFailedError, "Modal was not reached"),
    ("ConnectionError", ConnectionFailedError, "Modal was not reached"),
    ("TimeoutError", ConnectionFailedError, "Modal was not reached"),
    ("StreamTerminatedError", ConnectionFailedError, "Modal was not reached"),
    ("ClientClosed", ConnectionFailedError, "the connection to Modal was closed"),
)
"""Exception of Modal's client (or of grpclib, below it) → ours, and what it means. The first that
fits."""


def error_of(error: Exception, settings: ClientConfig) -> KalmError:
    """What Modal's client raised, as ours.

    The packed method returns its errors. What is not of Modal's client was raised in a container,
    and not by the method: it could not start, or has other code in it.
    """
    names = {
        kind.__name__
        for kind in type(error).__mro__
        if kind.__module__.partition(".")[0] in ("modal", "grpclib")
    }
    ours, meaning = next(
        ((ours, meaning) for name, ours, meaning in _KINDS if name in names),
        (ContainerFailedError, "a container of {place} failed"),
    )
    meaning = meaning.format(place=_place(settings), install=install_command("modal"))
    said = without_sign_in_advice(str(error)).strip().rstrip(".")
    return ours(": ".join(part for part in (meaning, type(error).__name__, said) if part) + ".")


_process = os.getpid()
_abandoned: list[Any] = []


def _leave_parents_channels_alone() -> None:
    """In a forked child: keep what Modal's client inherited, and is about to drop.

    Collected as garbage, a channel takes its socket out of the selector that the child shares with
    its parent, whose next call would then wait for half a minute.
    """
    global _process
    if _process != os.getpid():
        from grpclib.client import Channel

        _process = os.getpid()
        _abandoned.extend(found for found in gc.get_objects() if issubclass(type(found), Channel))


def _place(settings: ClientConfig) -> str:
    where = f" in environment {settings.environment_name!r}" if settings.environment_name else ""
    return f"Modal app {settings.app_name!r}{where}, class {settings.class_name!r}"
