"""The HTTP server of `kalm serve`: uvicorn with limited connections and a graceful shutdown.

On Modal, the ASGI app runs under Modal's server instead.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

import uvicorn

from kalm_integrations.errors import ConfigurationError
from modal_backend.http.connection_table import ConnectionTable
from modal_backend.http.connections import Connection

log = logging.getLogger(__name__)
console = logging.getLogger("uvicorn.error")

BACKLOG: Final = 1024
MAX_CONNECTIONS: Final = 10_000
"""However many files the process may open: each connection takes about 10 kB of memory."""
_MAX_FILES: Final = 2**20
_ACCEPTED_AT_ONCE: Final = 16
_LOG_SECONDS: Final = 60.0
_TICK_SECONDS: Final = 0.1  # uvicorn's
_BEHIND_SECONDS: Final = 0.05
_CLOSE_SECONDS: Final = 1.0
"""Time to send the responses to requests that are refused at the end of the grace period."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Time limits of connections, and which browser pages may call.

    Attributes:
        keep_alive: Seconds that a connection may be idle between requests. Proxies and clients
            should close theirs earlier (nginx after 60 s), or they send a request just when the
            server closes.
        grace: Seconds that requests in progress have to finish once the server is told to stop.
        cors_origins: See `modal_backend.http.app.create_app`.
    """

    keep_alive: int = 75
    grace: float = 10.0
    cors_origins: tuple[str, ...] = ()


def raise_file_limit() -> None:
    """Raise the number of files that this process may open as far as it is allowed to."""
    # Windows has no such limit; macOS allows less than its hard limit.
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connection_limit() -> int:
    """How many connections leave enough open files for everything else in this process."""
    try:
        import resource
    except ImportError:
        return MAX_CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    folder = Path("/proc/self/fd") if Path("/proc/self/fd").exists() else Path("/dev/fd")
    in_use = len(os.listdir(folder))  # noqa: PTH208 (a listing, whose entries vanish)
    reserve = max(32, min(soft // 8, 256))
    return max(1, min(soft - in_use - reserve, MAX_CONNECTIONS))


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets of all addresses of `host`. They refuse connections until the server listens.

    Raises:
        ConfigurationError: There is no such host, or the port cannot be used.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigurationError(f"--host {host}: {error.strerror}.") from error
    with ExitStack() as close_on_error:
        listeners = []
        for family, kind, protocol, _, address in dict.fromkeys(addresses):
            listener = close_on_error.enter_context(socket.socket(family, kind, protocol))
            listeners.append(listener)
            if os.name == "posix":  # elsewhere it would share a port that is in use
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                listener.bind(address)
            except OSError as error:
                raise _cannot_listen(host, port, error) from error
            listener.setblocking(False)
        close_on_error.pop_all()
    return listeners


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"cannot listen on {host}:{port}: {error.strerror}. Choose another --host or --port."
    )


class HttpServer(uvicorn.Server):
    """Serves an ASGI app on sockets from `bind`.

    It accepts connections itself. asyncio's server would accept them until no file can be opened,
    and then log an error for each place in its backlog.

    Args:
        app: The ASGI app.
        listeners: Sockets to listen on; closed at the end.
        options: Time limits of connections.
        end_now: Called with the number of a second signal; ends the process.
        uvicorn_options: Passed to `uvicorn.Config`.
    """

    def __init__(
        self,
        app: Any,
        listeners: list[socket.socket],
        options: ServerOptions = ServerOptions(),
        *,
        end_now: Callable[[int, FrameType | None], None] | None = None,
        **uvicorn_options: Any,
    ) -> None:
        config = uvicorn.Config(
            app,
            # Explicit, so that it does not depend on which packages are installed.
            http=Connection,
            ws="none",
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=options.keep_alive,
            **uvicorn_options,
        )
        super().__init__(config)
        self.listeners = listeners
        self.table = ConnectionTable(1)
        self.on_ready: Callable[[], None] = lambda: None
        self._options = options
        self._end_now = end_now
        self._tasks: set[asyncio.Task[None]] = set()
        """Tasks that accept connections or set them up."""
        self._logged = -_LOG_SECONDS
        self._accept_error: OSError | None = None
        self.behind = False
        """Whether the event loop takes long for one round: what arrives waits to be read."""
        self._ticked = 0.0

    @property
    def stopping(self) -> bool:
        """Whether no new requests are accepted."""
        return self.should_exit

    @property
    def signal(self) -> int | None:
        """Number of the signal that ended it; None if there was none."""
        return self._captured_signals[0] if self._captured_signals else None

    @property
    def address(self) -> str:
        """URL of the first address."""
        host, port, *_ = self.listeners[0].getsockname()
        scheme = "https" if self.config.is_ssl else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        self.servers = []
        for listener in self.listeners:
            try:
                listener.listen(BACKLOG)
            except OSError as error:  # another process listens on the port since `bind`
                host, port, *_ = listener.getsockname()
                raise _cannot_listen(host, port, error) from error
        self.table.limit = connection_limit()
        for listener in self.listeners:
            self._start(self._accept(listener)).add_done_callback(self._accepting_ended)
        self.started = True
        self.on_ready()

    async def on_tick(self, counter: int) -> bool:
        now = asyncio.get_running_loop().time()
        self.behind = now - self._ticked > _TICK_SECONDS + _BEHIND_SECONDS
        self._ticked = now
        if counter % 10 == 0:  # once a second
            for connection in list(self.table.connections):
                connection.check_deadlines(now)
            self._log_closed(now)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish the requests in progress. The app refuses new ones meanwhile, by `stopping`."""
        self.table.stopping = True
        for connection in self.table.connections:
            connection.close_after_response()
        if requests := set(self.server_state.tasks):
            console.info(
                "Stopping: %d requests in progress have %g seconds. A second signal ends at once.",
                len(requests),
                self._options.grace,
            )
            _, late = await asyncio.wait(requests, timeout=self._options.grace)
            for request in late:
                request.cancel()
            if late:
                await asyncio.wait(late, timeout=_CLOSE_SECONDS)
        for task in self._tasks:
            task.cancel()
        for listener in self.listeners:
            listener.close()
        for connection in list(self.table.connections):
            connection.transport.close()  # sends what has been written
        with suppress(TimeoutError):
            await asyncio.wait_for(self.table.wait_until_empty(), _CLOSE_SECONDS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._captured_signals and self._end_now is not None:
            self._end_now(sig, frame)
        self.table.stopping = True
        super().handle_exit(sig, frame)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for accepted in itertools.count(1):
            await self.table.wait_for_capacity()
            try:
                peer, _ = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno != errno.ECONNABORTED:  # else the caller has already disconnected
                    self._accept_error = error  # the system has no file or memory left
                    await asyncio.sleep(0.5)
                continue
            self.table.connecting += 1
            self._start(self._connect(peer))
            if accepted % _ACCEPTED_AT_ONCE == 0:
                await asyncio.sleep(0)  # let other tasks run

    def _accepting_ended(self, task: asyncio.Task[None]) -> None:
        """Stop the server if it cannot accept connections any more."""
        if not task.cancelled() and (error := task.exception()):
            log.critical("the server cannot accept connections any more", exc_info=error)
            self.should_exit = True

    async def _connect(self, peer: socket.socket) -> None:
        connection = partial(
            Connection,
            config=self.config,
            server_state=self.server_state,
            app_state={},
            table=self.table,
        )
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(connection, peer, ssl=self.config.ssl)
        except OSError:  # the caller has already disconnected
            peer.close()
        finally:
            self.table.connecting -= 1

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _log_closed(self, now: float) -> None:
        """Log once a minute how many connections were closed, if any were."""
        table, error = self.table, self._accept_error
        if now - self._logged < _LOG_SECONDS or not (table.evicted or table.timed_out or error):
            return
        log.warning(
            "%d of at most %d connections are open; closed to make room: %d, closed because they "
            "were too slow: %d%s. A higher limit for open files (LimitNOFILE, ulimit -n) allows "
            "more connections.",
            len(table),
            table.limit,
            table.evicted,
            table.timed_out,
            f"; not accepted: {error}" if error else "",
        )
        self._logged = now
        self._accept_error = None
        table.evicted = table.timed_out = 0
