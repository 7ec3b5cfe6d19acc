"""The HTTP server of `kalm serve`: uvicorn with bounded connections and an orderly end.

No part of it is needed where the ASGI app runs under another server, as it does on Modal.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import uvicorn

from kalm_integrations.errors import ConfigurationError
from modal_backend.http.connection_table import Closed, ConnectionTable
from modal_backend.http.connections import Connection

log = logging.getLogger(__name__)
console = logging.getLogger("uvicorn.error")

BACKLOG: Final = 1024
MAX_CONNECTIONS: Final = 10_000
"""However many files the process may open: each connection takes about 10 kB of memory."""
_MAX_FILES: Final = 2**20
_ACCEPTED_AT_ONCE: Final = 16
_LOG_EVERY: Final = 60.0
_LAST_ANSWERS: Final = 1.0
"""Seconds in which what is refused at the end of the grace period is answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How long connections last, and who may call from a browser.

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
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    with suppress(ValueError, OSError):  # macOS allows less than its hard limit
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
    bound: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(addresses):
            one = socket.socket(family, kind, protocol)
            bound.append(one)
            if os.name == "posix":  # elsewhere it would share a port that is in use
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind(address)
            one.setblocking(False)
    except OSError as error:
        for one in bound:
            one.close()
        if error.errno not in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
            raise
        raise _cannot_listen(host, port, error) from error
    return bound


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"cannot listen on {host}:{port}: {error.strerror}. Choose another --host or --port."
    )


class HttpServer(uvicorn.Server):
    """Serves an ASGI app on sockets from `bind`.

    Accepting connections is done here and not by asyncio's server, which takes new connections
    until no file can be opened, and then logs an error for each place in its backlog.

    Args:
        app: The ASGI app.
        listeners: Where to listen; closed at the end.
        options: How long connections last.
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
            # Named, so that it does not depend on what happens to be installed.
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
        self._accepting: list[asyncio.Task[None]] = []
        self._connecting: set[asyncio.Task[None]] = set()
        self._logged = -_LOG_EVERY
        self._accept_error: OSError | None = None

    @property
    def stopping(self) -> bool:
        """Whether no new work is taken."""
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
            except OSError as error:  # another process has been quicker
                host, port, *_ = listener.getsockname()
                raise _cannot_listen(host, port, error) from error
        self.table.limit = connection_limit()
        loop = asyncio.get_running_loop()
        self._accepting = [loop.create_task(self._accept(one)) for one in self.listeners]
        for task in self._accepting:
            task.add_done_callback(self._accepting_ended)
        self.started = True
        self.on_ready()

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # once a second
            now = asyncio.get_running_loop().time()
            for connection in self.table.connections():
                connection.check_deadlines(now)
            self._log_closed(now)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what is in progress; meanwhile refuse what comes (the app does, by `stopping`)."""
        self.table.stopping = True
        for connection in self.table.connections():
            connection.close_after_answer()
        in_progress = set(self.server_state.tasks)
        if in_progress:
            console.info(
                "Stopping: %d requests in progress have %g seconds. A second signal ends at once.",
                len(in_progress),
                self._options.grace,
            )
            _, late = await asyncio.wait(in_progress, timeout=self._options.grace)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=_LAST_ANSWERS)
        for task in self._accepting:
            task.cancel()
        for listener in self.listeners:
            listener.close()
        for connection in self.table.connections():
            connection.transport.close()  # sends what has been written
        with suppress(TimeoutError):
            await asyncio.wait_for(self.table.empty(), _LAST_ANSWERS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._captured_signals and self._end_now is not None:
            self._end_now(sig, frame)
        self.table.stopping = True
        super().handle_exit(sig, frame)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        accepted = 0
        while True:
            await self.table.room()
            try:
                peer, _ = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno != errno.ECONNABORTED:  # else the caller has already gone
                    self._accept_error = error  # no file or no memory is left in the whole system
                    await asyncio.sleep(0.5)
                continue
            self.table.connecting += 1
            task = loop.create_task(self._connect(peer))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)
            accepted += 1
            if accepted % _ACCEPTED_AT_ONCE == 0:
                await asyncio.sleep(0)  # others have their turn

    def _accepting_ended(self, task: asyncio.Task[None]) -> None:
        """End the server if it does not accept connections any more, rather than seem to run."""
        if not task.cancelled() and (error := task.exception()):
            log.critical("the server cannot accept connections any more", exc_info=error)
            self.should_exit = True

    async def _connect(self, peer: socket.socket) -> None:
        def connection() -> Connection:
            return Connection(
                config=self.config,
                server_state=self.server_state,
                app_state={},
                table=self.table,
            )

        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(connection, peer, ssl=self.config.ssl)
        except OSError:  # the caller has already gone
            peer.close()
        finally:
            self.table.connecting -= 1

    def _log_closed(self, now: float) -> None:
        closed = self.table.closed
        if now - self._logged < _LOG_EVERY or not (
            closed.for_room or closed.late or self._accept_error
        ):
            return
        error = f"; not accepted: {self._accept_error}" if self._accept_error else ""
        log.warning(
            "%d of at most %d connections are open; closed to make room: %d, closed because they "
            "were too slow: %d%s. A higher limit for open files (LimitNOFILE, ulimit -n) allows "
            "more connections.",
            len(self.table),
            self.table.limit,
            closed.for_room,
            closed.late,
            error,
        )
        self._logged = now
        self._accept_error = None
        self.table.closed = Closed()
