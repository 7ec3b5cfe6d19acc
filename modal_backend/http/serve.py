"""`kalm serve`: the HTTP door on this machine."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Final

from pydantic import SecretStr

from kalm_integrations.errors import ConfigurationError, KalmError
from kalm_integrations.models import KALM
from modal_backend import lifecycle
from modal_backend.engines.base import Engine
from modal_backend.engines.embedded_process import ProcessEngine
from modal_backend.engines.vllm.config import VLLMOptions
from modal_backend.http.app import create_app
from modal_backend.http.middleware import BearerKeys
from modal_backend.http.server import HttpServer, ServerOptions, bind, raise_file_limit
from modal_backend.log_output import never_block_on_output
from modal_backend.settings import CanaryMode

Load = Callable[[], Awaitable[Engine]]

_CLOSE_SECONDS: Final = 3.0
"""What closing the engine may take: a computation cannot be interrupted."""
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
    model: Model | None,
    host: str,
    port: int,
    api_key: SecretStr | None,
    *,
    insecure: bool,
    canary_mode: CanaryMode = "refuse",
    options: ServerOptions = ServerOptions(),  # noqa: B008 (frozen)
) -> None:
    """Serve until interrupted, or until the engine dies.

    Args:
        model: What vLLM serves; None serves the embedded engine.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_key: What callers must present.
        insecure: Serve without a key. On a loopback address only.
        canary_mode: What becomes of an engine that fails the canary: "refuse" or "warn".
        options: How long connections and requests last, and who may call from a browser.

    Raises:
        ConfigurationError: Not exactly one of a key and `insecure`, a key that is not ASCII,
            `insecure` for other machines, a revision of a folder, or an address that is taken.
        ImportError: vLLM is to be used and not installed.
        KalmError: The engine cannot be loaded, cannot be trusted, or died.
        KeyboardInterrupt: Ctrl-C; all is closed.
        SystemExit: Of status 143, by SIGTERM; all is closed.
    """
    keys = _keys(api_key, host, insecure=insecure)
    with ExitStack() as cleanup:
        listeners = bind(host, port)  # before a minute or more is spent on loading
        for listener in listeners:
            cleanup.callback(listener.close)
        raise_file_limit()
        _end_by_exception()
        load: Load = _embedded
        if model is not None:
            _check(model)
        never_block_on_output()
        if model is not None:
            _say(f"loading {model.model} with vLLM; a minute or more")
            load = _Abandonable(model.load)
        container = lifecycle.Lifecycle(load, "off", canary_mode=canary_mode)
        asyncio.run(_serve(container, listeners, keys, options, cleanup))


def _keys(api_key: SecretStr | None, host: str, *, insecure: bool) -> list[SecretStr] | None:
    """What callers have to present; None serves without a key."""
    key = api_key.get_secret_value().strip() if api_key else ""
    if not key.isascii():
        raise ConfigurationError(
            "KALM_API_KEY has characters that are not ASCII, which HTTP headers cannot carry. "
            "Choose another key, for instance the output of `openssl rand -hex 32`."
        )
    if key and insecure:
        raise ConfigurationError(
            "--insecure-no-auth serves without a key, but KALM_API_KEY is set. Leave out the "
            "option, or unset the variable."
        )
    if key:
        return [SecretStr(key)]
    if not insecure:
        raise ConfigurationError(
            "a service without a key is open to everybody. Set KALM_API_KEY (for instance to the "
            "output of `openssl rand -hex 32`), or pass --insecure-no-auth to serve this machine "
            "only."
        )
    if not _is_loopback(host):
        raise ConfigurationError(f"--insecure-no-auth is for 127.0.0.1 only, not for {host}.")
    return None


async def _serve(
    container: lifecycle.Lifecycle,
    listeners: list[socket.socket],
    keys: list[SecretStr] | None,
    options: ServerOptions,
    cleanup: ExitStack,
) -> None:
    # What it would log with a traceback is raised here, and said once.
    lifecycle.log.setLevel(logging.CRITICAL)
    try:
        await container.resume()
        failure = container.failure
        if failure is not None:
            raise copy(failure)
        for warning in container.service.warnings:
            _say(f"WARNING: {warning.message}")
        app = create_app(
            container.service,
            keys=BearerKeys(keys),
            phases=container.phases,
            stopping=lambda: server.stopping,
            cors_origins=options.cors_origins,
        )
        space = container.service.identity
        authentication = "key required" if keys else "NO AUTHENTICATION"
        what = f"{space.model}, identity {space.fingerprint}, {authentication}"
        # A line for each request would cost more than refusing one does; /metrics counts them.
        server = HttpServer(app, listeners, options, end_now=_abandon, access_log=False)
        server.on_ready = lambda: _say(f"ready: {what}, on {server.address}")

        async def stop() -> None:
            server.should_exit = True

        watching = asyncio.create_task(container.watch(stop))
        try:
            await server.serve()  # at its end raises what signal came
        finally:
            watching.cancel()
            if server.signal is not None:
                # A computation cannot be interrupted, and closing would wait for it.
                limit = threading.Timer(_CLOSE_SECONDS, _abandon, (server.signal, None))
                limit.daemon = True
                limit.start()
                cleanup.callback(limit.cancel)
        failure = container.failure
        if failure is not None:
            reason = failure.args[0]  # the error's own remedy is for callers
            raise KalmError(f"{reason} Start it again, or have a supervisor do so.")
    finally:
        await container.close()


async def _embedded() -> Engine:
    return await ProcessEngine.start()


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
