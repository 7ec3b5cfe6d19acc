"""`kalm serve`: the HTTP door on this machine."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from copy import copy
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Final

import uvicorn
from pydantic import SecretStr

from kalm_integrations.errors import ConfigurationError, KalmError
from kalm_integrations.profiles import KALM
from modal_backend import life
from modal_backend.engines import Engine
from modal_backend.engines.embedded_process import ProcessEngine
from modal_backend.engines.vllm.config import VLLMOptions
from modal_backend.http_api import create_app
from modal_backend.http_guard import BearerKeys

Load = Callable[[], Awaitable[Engine]]

_GRACE: Final = 10  # seconds that answers in progress have to finish
_VLLM_ENVIRONMENT: Final = {
    "VLLM_LOGGING_LEVEL": "WARNING",  # it tells much; what matters here is what went wrong
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}
"""What is set already stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What vLLM is to run.

    Attributes:
        model: A folder, or a repository in the Hugging Face cache.
        revision: Of the repository; None is the pinned one, else "main".
        options: How it is run.
    """

    model: str = KALM.space.model
    revision: str | None = None
    options: VLLMOptions = VLLMOptions()  # noqa: RUF009 (frozen)

    async def load(self) -> Engine:
        """The running engine.

        Raises:
            EngineLoadError: The weights are not on this machine, or vLLM could not load them.
        """
        from modal_backend.engines.vllm.engine import VLLMEngine

        return await VLLMEngine.load_by_name(self.model, self.revision, self.options)


def serve(
    model: Model | None, host: str, port: int, api_key: SecretStr | None, *, insecure: bool
) -> None:
    """Serve until interrupted, or until the engine dies.

    Args:
        model: What vLLM serves; None serves the embedded engine.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_key: What callers must present.
        insecure: Serve without a key. On a loopback address only.

    Raises:
        ConfigurationError: Neither a key nor `insecure`, `insecure` for other machines, a revision
            of a folder, or an address that is taken.
        ImportError: vLLM is to be used and not installed.
        KalmError: The engine cannot be loaded, cannot be trusted, or died.
        KeyboardInterrupt: Ctrl-C; all is closed.
        SystemExit: Of status 143, by SIGTERM; all is closed.
    """
    if api_key is not None and not api_key.get_secret_value().strip():
        api_key = None
    if api_key is None and not insecure:
        raise ConfigurationError(
            "a service without a key is open to everybody. Set KALM_API_KEY (for instance to the "
            "output of `openssl rand -hex 32`), or pass --insecure-no-auth to serve this machine "
            "only."
        )
    if api_key is None and not _is_loopback(host):
        raise ConfigurationError(f"--insecure-no-auth is for 127.0.0.1 only, not for {host}.")
    _check_free(host, port)  # before a minute or more is spent on loading
    keys = BearerKeys([api_key] if api_key else None)
    _end_by_exception()
    load: Load = _embedded
    if model is not None:
        _check(model)
        _say(f"loading {model.model} with vLLM; a minute or more")
        load = _Abandonable(model.load)
    asyncio.run(_serve(load, host, port, keys))


async def _serve(load: Load, host: str, port: int, keys: BearerKeys) -> None:
    # What it would log with a traceback is raised here, and said once.
    life.log.setLevel(logging.CRITICAL)
    container = life.Life(load, "off")
    try:
        await container.resume()
        failure = container.failure
        if failure is not None:
            raise copy(failure)
        app = create_app(container.service, keys=keys, phases=container.phases)
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            timeout_graceful_shutdown=_GRACE,
            server_header=False,
            access_log=False,  # /metrics counts requests; a line for each takes too long
        )
        space = container.service.identity
        server = _Server(config, f"{space.model}, identity {space.fingerprint}")

        async def give_way() -> None:
            server.should_exit = True

        watching = asyncio.create_task(container.watch(give_way))
        try:
            await server.serve()  # at its end raises what signal came
        finally:
            watching.cancel()
        failure = container.failure
        if failure is not None:
            reason = failure.args[0]  # the error's own remedy is for callers
            raise KalmError(f"{reason} Start it again, or have a supervisor do so.")
    finally:
        await container.close()


class _Server(uvicorn.Server):
    """Says where it listens, and what is served there."""

    def __init__(self, config: uvicorn.Config, what: str) -> None:
        super().__init__(config)
        self._what = what

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port, *_ = self.servers[0].sockets[0].getsockname()
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            _say(f"ready: {self._what}, on http://{address}")


async def _embedded() -> Engine:
    return ProcessEngine.load()


def _check(model: Model) -> None:
    if find_spec("vllm") is None:
        raise ImportError("vLLM is not installed")
    if model.revision is not None and Path(model.model).expanduser().is_dir():
        raise ConfigurationError(
            f"--revision is one of a repository: the files of {model.model} are what they are."
        )
    for name, value in _VLLM_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _end_by_exception() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)


def _interrupt(number: int, _: FrameType | None) -> None:
    """End by an exception, so that all is closed on the way out. uvicorn holds signals back until
    it has stopped."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


class _Abandonable:
    """Loads, and ends the process at once when it is told to meanwhile.

    An exception would not do: the event loop stands still, and some of what vLLM imports swallows
    exceptions. There is nothing yet to be closed but vLLM's processes.

    Ctrl-C in a terminal goes to all processes of its group. It is blocked here while they are
    started, and so in them for good: it is for this process to end them, when all is answered.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._loaded = False

    async def __call__(self) -> Engine:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _abandon)
        resource_tracker.ensure_running()  # when it starts, it unblocks
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        waiting = threading.Thread(target=self._wait, daemon=True)
        waiting.start()
        try:
            return await self._load()
        finally:
            self._loaded = True
            signal.pthread_kill(waiting.ident or 0, signal.SIGINT)
            waiting.join()
            _end_by_exception()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def _wait(self) -> None:
        signal.sigwait({signal.SIGINT})
        if not self._loaded:
            _abandon(signal.SIGINT, None)


def _abandon(number: int, _: FrameType | None) -> None:
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(128 + number)


def _check_free(host: str, port: int) -> None:
    """Whether the server will be able to listen there, as far as can be told without listening."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ConfigurationError(f"--host {host}: {error.strerror}.") from error
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(address)
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
                    raise ConfigurationError(
                        f"cannot listen on {host}:{port}: {error.strerror}."
                    ) from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _say(line: str) -> None:
    sys.stderr.write(f"kalm serve: {line}\n")
    sys.stderr.flush()
