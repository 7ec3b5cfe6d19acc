"""backend="modal": the app of `kalm deploy`, over Modal's RPC.

Below the retry policy (`retry`), Modal's client repeats inputs that it has lost and connects again.
Everything else, such as rate limits and containers that fail, is left to the policy.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kalm_integrations import tracing
from kalm_integrations.codec import unpack
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
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.install_hints import install_command
from kalm_integrations.native_threads import is_patched
from kalm_integrations.protocol import (
    EmbedRequest,
    EmbedResponse,
    ServiceDescription,
    error_from_fields,
    read_warnings,
)
from kalm_integrations.transports.http import HttpTransport

if TYPE_CHECKING:
    from kalm_integrations.config import ClientConfig

T = TypeVar("T")


class ModalTransport:
    """Calls the method `embed_packed` of the app's class. Modal's client, one per process, owns the
    connections."""

    can_be_cold = True

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._methods: dict[str, Any] = {}
        """Kept, because a lookup takes two calls to Modal's servers."""

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        request = replace(request, trace_context=tracing.trace_context() or None)
        # Without what is None, so that a service of an older version understands it.
        fields = {name: value for name, value in asdict(request).items() if value is not None}
        reply = await self._call("embed_packed", fields)
        packed = reply.get("packed")
        if not isinstance(packed, bytes):
            raise InvalidResponseError("the response of embed_packed has no packed vectors.")
        return unpack(packed)

    async def count_tokens(self, request: EmbedRequest) -> list[int]:
        reply = await self._call("count_tokens", asdict(request))
        counts = reply.get("counts")
        if not isinstance(counts, list):
            raise InvalidResponseError("the response of count_tokens has no counts.")
        return counts

    async def ensure_ready(self) -> ServiceDescription:
        """Start a container if none runs, and return its description."""
        reply = await self._call("describe")
        try:
            identity = SpaceIdentity.from_dict(reply["identity"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidResponseError(f"describe returned no identity: {error}.") from error
        return ServiceDescription(identity, read_warnings(reply))

    async def close(self) -> None:
        """Nothing: Modal's client belongs to the process."""

    async def _call(self, method: str, *arguments: Any) -> dict[str, Any]:
        cached = method in self._methods
        try:
            reply = await translated(self._remote(method, arguments), self._config)
        except KalmError as error:
            self._methods.pop(method, None)
            if cached and isinstance(error, NotDeployedError):  # it may have been redeployed
                return await self._call(method, *arguments)
            raise
        if not isinstance(reply, dict):
            raise InvalidResponseError(f"{method} returned {type(reply).__name__}.")
        if "error" in reply:
            raise error_from_fields(reply["error"])
        return reply

    async def _remote(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if method not in self._methods:
            remote = getattr(deployed(self._config), method)
            async with _connect_timeout(self._config):
                await remote.hydrate.aio()
            self._methods[method] = remote
        try:
            return await self._methods[method].remote.aio(*arguments)
        except KalmError as error:  # raised when the container started: methods return theirs
            raise ContainerFailedError(
                f"a container of {_location(self._config)} failed: {type(error).__name__}: {error}"
            ) from error


class ModalHttpTransport:
    """backend="http" without a base_url: the HTTP endpoint of the app, whose URL Modal knows."""

    can_be_cold = True

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._lookup: asyncio.Task[HttpTransport] | None = None

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        return await (await self._transport()).embed(request)

    async def count_tokens(self, request: EmbedRequest) -> list[int]:
        return await (await self._transport()).count_tokens(request)

    async def ensure_ready(self) -> ServiceDescription | None:
        return await (await self._transport()).ensure_ready()

    async def close(self) -> None:
        lookup, self._lookup = self._lookup, None
        if lookup is not None and not lookup.cancel() and not lookup.exception():
            await lookup.result().close()

    async def _transport(self) -> HttpTransport:
        lookup = self._lookup
        if lookup is None or (lookup.done() and lookup.exception()):  # failed: look up again
            lookup = self._lookup = asyncio.create_task(self._look_up())
        return await asyncio.shield(lookup)

    async def _look_up(self) -> HttpTransport:
        url = await http_url(self._config)
        return HttpTransport(self._config.model_copy(update={"base_url": url}))


def deployed(config: ClientConfig) -> Any:
    """A handle of the deployed class; sends nothing yet.

    Raises:
        ConfigurationError: Modal's package is missing, or cannot work because gevent has patched
            threads.
    """
    if is_patched("threading"):
        raise ConfigurationError(
            "Modal's client needs real threads, and gevent has patched them: pass base_url=, the "
            "URL that `kalm deploy` printed, with modal_key= and modal_secret=."
        )
    try:
        import modal
    except ImportError as error:
        raise ConfigurationError(
            f'backend="modal" needs Modal\'s client: {install_command("modal")}.'
        ) from error
    _keep_inherited_channels()
    hpack = logging.getLogger("hpack")  # under Modal's client; its DEBUG lines show the token
    if hpack.level < logging.INFO:
        hpack.setLevel(logging.INFO)
    return modal.Cls.from_name(
        config.app_name, config.class_name, environment_name=config.environment_name
    )()


async def http_url(config: ClientConfig) -> str:
    """The URL of the app's HTTP endpoint. Starts no container.

    Raises:
        NotDeployedError: The app, its class or its HTTP endpoint does not exist.
    """
    async with _connect_timeout(config):
        url = await translated(deployed(config).http.get_web_url.aio(), config)
    if not url:
        raise NotDeployedError(f"{_location(config)} has no HTTP endpoint.")
    return str(url)


@asynccontextmanager
async def _connect_timeout(config: ClientConfig) -> AsyncIterator[None]:
    """Limit the time to reach Modal to `connect_timeout`; its client tries for a minute."""
    limit = config.connect_timeout
    try:
        async with asyncio.timeout(limit) as timer:
            yield
    except TimeoutError as error:
        if not timer.expired():
            raise
        message = f"Modal was not reached within connect_timeout={limit:g} s."
        raise ConnectionFailedError(message) from error


async def translated(work: Awaitable[T], config: ClientConfig) -> T:
    """The result of a call to Modal's client, with its exceptions translated.

    Raises:
        KalmError: Always one of these.
    """
    try:
        return await work
    except KalmError:
        raise
    except Exception as error:
        raise error_of(error, config) from error


_TRANSLATIONS: Final[tuple[tuple[set[str], type[KalmError], str], ...]] = (
    ({"AuthError"}, ModalTokenError, "Modal refused the token, or there is none"),
    ({"NotFoundError"}, NotDeployedError, "{location} is not what this client needs"),
    ({"PermissionDeniedError"}, PermissionDeniedError, "Modal forbids it"),
    ({"ResourceExhaustedError"}, RateLimitError, "Modal's limit for the workspace"),
    (
        {"FunctionTimeoutError"},
        DeadlineExceededError,
        "over the deployment's time limit for a call, which `kalm deploy --timeout` raises",
    ),
    ({"OutputExpiredError"}, DeadlineExceededError, "Modal no longer has the output"),
    ({"RequestSizeError"}, RequestTooLargeError, "Modal"),
    ({"VersionError"}, ConfigurationError, "upgrade Modal's client ({install})"),
    ({"InvalidError"}, ConfigurationError, "Modal refused the call"),
    (
        {"ServiceError", "InternalError", "ConnectionError", "TimeoutError"}
        | {"StreamTerminatedError"},
        ConnectionFailedError,
        "Modal was not reached",
    ),
    ({"ClientClosed"}, ConnectionFailedError, "the connection to Modal was closed"),
)
"""Exceptions of Modal's client or grpclib, our error, its meaning. The first match counts."""


def error_of(error: Exception, config: ClientConfig) -> KalmError:
    """Translate an exception of Modal's client.

    Our methods return their errors. So an exception of another package was raised in a container
    that could not start, or that runs other code.
    """
    bases = type(error).__mro__
    names = {b.__name__ for b in bases if b.__module__.partition(".")[0] in ("modal", "grpclib")}
    kind, meaning = next(
        ((kind, meaning) for known, kind, meaning in _TRANSLATIONS if known & names),
        (ContainerFailedError, "a container of {location} failed"),
    )
    meaning = meaning.format(location=_location(config), install=install_command("modal"))
    message = str(error).strip().rstrip(".")
    parts = (meaning, type(error).__name__, message)
    return kind(": ".join(part for part in parts if part) + ".")


_process = os.getpid()
_inherited: list[Any] = []


def _keep_inherited_channels() -> None:
    """In a forked child: keep the channels that Modal's client inherited and would drop.

    A channel that is garbage-collected removes its socket from the selector that parent and child
    share; the parent's next call would then wait for half a minute.
    """
    global _process
    if _process != os.getpid():
        from grpclib.client import Channel

        _process = os.getpid()
        _inherited.extend(each for each in gc.get_objects() if issubclass(type(each), Channel))


def _location(config: ClientConfig) -> str:
    environment = f" in environment {config.environment_name!r}" if config.environment_name else ""
    return f"Modal app {config.app_name!r}{environment}, class {config.class_name!r}"
