"""`kalm serve`: run an engine on this machine and serve its HTTP API."""

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
from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from functools import partial
from importlib.util import find_spec
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Final

from pydantic import SecretStr

from kalm_integrations.errors import ConfigurationError, KalmError
from kalm_integrations.models import KALM
from modal_backend.engines.base import Engine
from modal_backend.engines.registry import EngineType, Load, Options
from modal_backend.http.app import create_app
from modal_backend.http.auth import FILE_VARIABLE, BearerKeys
from modal_backend.http.server import HttpServer, ServerOptions, bind, raise_file_limit
from modal_backend.lifecycle import Lifecycle
from modal_backend.lifecycle import log as lifecycle_log
from modal_backend.log_output import never_block_on_output
from modal_backend.settings import CanaryMode

log = logging.getLogger(__name__)

_CLOSE_SECONDS: Final = 3.0
"""Limit for closing the engine: a computation cannot be interrupted."""


def serve(
    engine: EngineType,
    engine_options: Options,
    host: str,
    port: int,
    api_key: SecretStr | None,
    *,
    insecure: bool,
    keys_file: Path | None = None,
    canary_mode: CanaryMode = "refuse",
    options: ServerOptions = ServerOptions(),  # noqa: B008 (frozen)
) -> None:
    """Serve until interrupted, or until the engine dies.

    Args:
        engine: The engine to serve.
        engine_options: Options to load it with.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_key: The key that callers must present.
        insecure: Serve without a key. On a loopback address only.
        keys_file: More keys, read again at SIGHUP; see `modal_backend.http.auth.read_keys`.
        canary_mode: Whether to "refuse" an engine that fails the canary, or "warn" and serve it.
        options: Time limits of connections, and the origins of browser pages.

    Raises:
        ConfigurationError: Not exactly one of a key and `insecure`, a key that is not ASCII, a file
            of keys that cannot be used, `insecure` for other machines, a revision of a folder, or
            an address in use.
        ImportError: The engine's package is not installed.
        KalmError: The engine cannot be loaded, failed its check, or died.
        KeyboardInterrupt: Ctrl-C, after everything was closed.
        SystemExit: SIGTERM, after everything was closed; status 143.
    """
    keys = _keys(api_key, keys_file, host, insecure=insecure)
    if keys_file and hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is an event loop
    with ExitStack() as cleanup:
        listeners = bind(host, port)  # before a minute or more is spent on loading
        for listener in listeners:
            cleanup.callback(listener.close)
        raise_file_limit()
        _on_signals(_interrupt)
        if find_spec(engine.module) is None:
            raise ImportError(f"{engine.label} is not installed")
        never_block_on_output()
        load = engine.serve
        if engine.blocks:
            model = engine_options.get("model", KALM.space.model)
            _print(f"loading {model} with {engine.label}; a minute or more")
            load = partial(_load_interruptibly, engine.serve)
        lifecycle = Lifecycle(lambda: load(engine_options), "off", canary_mode=canary_mode)
        asyncio.run(_serve(lifecycle, listeners, keys, options, cleanup))


def _keys(api_key: SecretStr | None, file: Path | None, host: str, *, insecure: bool) -> BearerKeys:
    """The keys that callers may present."""
    key = api_key.get_secret_value().strip() if api_key else ""
    if not key.isascii():
        raise ConfigurationError(
            "KALM_API_KEY has characters that are not ASCII, which HTTP headers cannot carry. "
            "Choose another key, for instance the output of `openssl rand -hex 32`."
        )
    if (key or file) and insecure:
        name = "KALM_API_KEY" if key else FILE_VARIABLE
        raise ConfigurationError(
            f"--insecure-no-auth serves without a key, but {name} is set. Leave out the option, or "
            "unset the variable."
        )
    if key or file:
        return BearerKeys([SecretStr(key)], file)
    if not insecure:
        raise ConfigurationError(
            "a service without a key is open to everybody. Set KALM_API_KEY (for instance to the "
            "output of `openssl rand -hex 32`), or pass --insecure-no-auth to serve this machine "
            "only."
        )
    if not _is_loopback(host):
        raise ConfigurationError(f"--insecure-no-auth is for 127.0.0.1 only, not for {host}.")
    return BearerKeys(None)


async def _serve(
    lifecycle: Lifecycle,
    listeners: list[socket.socket],
    keys: BearerKeys,
    options: ServerOptions,
    cleanup: ExitStack,
) -> None:
    # It would log with its traceback the error that is raised here and printed once.
    lifecycle_log.setLevel(logging.CRITICAL)
    try:
        await lifecycle.resume()
        failure = lifecycle.failure
        if failure is not None:
            raise copy(failure)
        for warning in lifecycle.service.warnings:
            _print(f"WARNING: {warning.message}")
        app = create_app(
            lifecycle.service,
            keys=keys,
            phases=lifecycle.phases,
            stopping=lambda: server.stopping,
            behind=lambda: server.behind,
            cors_origins=options.cors_origins,
        )
        space = lifecycle.service.identity
        authentication = "key required" if keys.required else "NO AUTHENTICATION"
        summary = f"{space.model}, space {space.fingerprint}, {authentication}"
        # Logging a request would cost more than refusing it; /metrics counts them.
        server = HttpServer(app, listeners, options, end_now=_kill, access_log=False)
        server.on_ready = lambda: _print(f"ready: {summary}, on {server.address}")

        if keys.file and hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload, keys)

        async def stop() -> None:
            server.should_exit = True

        watching = asyncio.create_task(lifecycle.watch(stop))
        try:
            await server.serve()  # raises, at its end, the signal that ended it
        finally:
            watching.cancel()
            if server.signal is not None:
                # Closing waits for the computation, which cannot be interrupted.
                limit = threading.Timer(_CLOSE_SECONDS, _kill, (server.signal, None))
                limit.daemon = True
                limit.start()
                cleanup.callback(limit.cancel)
        failure = lifecycle.failure
        if failure is not None:
            # The remedy of the error is for callers.
            raise KalmError(f"{failure.message} Restart it, or have a supervisor do so.")
    finally:
        await lifecycle.close()


def _reload(keys: BearerKeys) -> None:
    try:
        _print(f"{FILE_VARIABLE} was read again: {keys.reload()} keys")
    except ConfigurationError as error:
        log.error("the keys of before stay valid: %s", error.message)


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _interrupt(number: int, _: FrameType | None) -> None:
    """End by an exception, so that everything is closed on the way out. uvicorn delays signals
    until it has stopped."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


async def _load_interruptibly(load: Load, options: Options) -> Engine:
    """Load an engine; a signal ends the process at once meanwhile.

    An exception would not end it: loading blocks the event loop, and some code that vLLM imports
    swallows exceptions. Only vLLM's processes have to be ended at that point.

    Ctrl-C in a terminal reaches all processes of its group. It is blocked while the engine's
    processes are started, and so remains blocked in them: this process ends them once it has
    answered its requests. Meanwhile a thread waits for it.
    """
    loaded = False

    def wait_for_interrupt() -> None:
        signal.sigwait({signal.SIGINT})
        if not loaded:
            _kill(signal.SIGINT, None)

    _on_signals(_kill)
    resource_tracker.ensure_running()  # starting it later would unblock the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    waiting = threading.Thread(target=wait_for_interrupt, daemon=True)
    waiting.start()
    try:
        return await load(options)
    finally:
        loaded = True
        signal.pthread_kill(waiting.ident or 0, signal.SIGINT)
        waiting.join()
        _on_signals(_interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _kill(number: int, _: FrameType | None) -> None:
    """End this process and its children at once."""
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


def _print(line: str) -> None:
    sys.stderr.write(f"kalm serve: {line}\n")
    sys.stderr.flush()
