"""Prints which of our functions one query passes through, there and back.

    python benchmarks/client/hops.py

The query runs in process and over HTTP, with the embedded engine. The first call is left out, since
it opens connections and loads the engine. Every function is listed once, in the order in which it
was first entered, on any thread. A comprehension, generator expression or lambda counts as part of
the function around it.

`*` marks a function that the query passes through: an argument, or what it returns or yields, holds
the text or its vector. The other functions compute something about it (a limit, a deadline, a
metric).
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np

from kalm_integrations import KalmClient
from kalm_integrations.models import EMBEDDED
from modal_backend.engines.embedded import EmbeddedEngine
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.http.server import HttpServer, bind
from modal_backend.service import EmbeddingService

ROOT = Path(__file__).parents[2]
FOLDERS = tuple(f"{ROOT}/{package}/" for package in ("kalm_integrations", "modal_backend"))
INNER = re.compile(r"(\.<locals>)?\.<(listcomp|setcomp|dictcomp|genexpr|lambda)>.*")
TEXT = "How tall is K2?"
NUMBERS = 256  # at least so many are a vector

_entered: dict[CodeType, bool] = {}
"""Each function, and whether the query passes through it."""
_recording = False


def main() -> None:
    """Print both lists."""
    threading.setprofile(_profile)  # before any thread starts
    sys.setprofile(_profile)
    with KalmClient(backend="local") as client:
        report("in process", client)
    with serving() as url, KalmClient(base_url=url, model=EMBEDDED.space.model) as client:
        report("over HTTP", client)


def report(title: str, client: KalmClient) -> None:
    """Print what the second query of `client` passes through."""
    global _recording
    client.embed_to_lists(["How high is Everest?"], role="query")
    _entered.clear()
    _recording = True
    client.embed_to_lists([TEXT], role="query")
    time.sleep(0.2)  # until the server has finished too
    _recording = False
    functions: dict[tuple[str, str], bool] = {}
    for code, passed in _entered.items():
        module = str(Path(code.co_filename).relative_to(ROOT))
        name = module, INNER.sub("", code.co_qualname)
        functions[name] = functions.get(name, False) or passed
    passed_through = [name for name, passed in functions.items() if passed]
    print(f"\n{title}: {counted(passed_through)}; {counted(list(functions))} run\n")
    for (module, function), passed in functions.items():
        print(f"{'*' if passed else ' '} {module:46} {function}")


def counted(functions: list[tuple[str, str]]) -> str:
    """Their number, and that of their modules."""
    return f"{len(functions)} functions in {len({module for module, _ in functions})} modules"


@contextmanager
def serving() -> Iterator[str]:
    """Serve the embedded engine on loopback; yields the base URL."""
    service = EmbeddingService(EmbeddedEngine.load())
    app = create_app(service, keys=BearerKeys(None))
    server = HttpServer(app, bind("127.0.0.1", 0), log_level="warning")
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.address
    finally:
        server.should_exit = True
        thread.join()
        asyncio.run(service.close())


def _profile(frame: FrameType, event: str, result: object) -> None:
    code = frame.f_code
    if not _recording or event not in ("call", "return"):
        return
    if not code.co_filename.startswith(FOLDERS) or _entered.get(code):
        return
    if event == "call":
        arguments = code.co_argcount + code.co_kwonlyargcount
        values = [frame.f_locals.get(name) for name in code.co_varnames[:arguments]]
    else:
        values = [result]
    _entered[code] = any(map(holds_query, values))


def holds_query(value: Any) -> bool:
    """Whether `value` is or contains the text or its vector."""
    if isinstance(value, str):
        return TEXT in value
    if isinstance(value, bytes | bytearray | memoryview):
        return TEXT.encode() in bytes(value) or len(value) > NUMBERS * 2
    if isinstance(value, np.ndarray):
        return value.size >= NUMBERS
    if dataclasses.is_dataclass(value):
        value = [getattr(value, each.name) for each in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return len(value) >= NUMBERS or any(map(holds_query, value))
    return False


if __name__ == "__main__":
    main()
