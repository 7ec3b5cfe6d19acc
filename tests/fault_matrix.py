"""The table "Faults" of docs/errors.md: causes each failure over each transport, and writes down
what every caller gets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from modal import exception as modal_errors
from scripted_engine import ScriptedEngine
from serving import FaultyServer, cut_off, reply, reset, serving, stall

from kalm_integrations import KalmClient, KalmModalEmbeddings, errors, retry
from kalm_integrations import llama_index as ours_for_llama_index
from kalm_integrations.models import EMBEDDED
from kalm_integrations.transports import modal
from kalm_integrations.transports.in_process import InProcessTransport
from modal_backend import rpc
from modal_backend.engines.base import EngineOutput
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.service import EmbeddingService

PAGE = Path(__file__).parents[1] / "docs/errors.md"
TEXTS = ["first", "bad", "third", "fourth"]
OPTIONS: dict[str, Any] = {"batch_size": 1, "max_concurrency": 1, "max_retries": 2}
SKIPPED = {"a text is too long", "a vector is not finite"}
"""What `iter_embed(on_error="skip")` skips."""

HTTP: dict[str, Any] = {
    "connection reset": reset,
    "response cut off": cut_off(600),
    "no response": stall,
    "400": reply(400, '{"error": {"message": "no"}}'),
    "401": reply(401, "no"),
    "403": reply(403, "no"),
    "404": reply(404, "no"),
    "429": reply(429, ""),
    "429 with Retry-After": reply(429, "", **{"Retry-After": "0.01"}),
    "500": reply(500, "oops"),
    "502 of a gateway": reply(502, "<title>Bad Gateway</title>", "text/html"),
    "503 with Retry-After": reply(503, "", **{"Retry-After": "0.01"}),
    "a login page": reply(200, "<html>", "text/html"),
    "damaged vectors": reply(200, b"garbage", "application/vnd.safetensors"),
    "a redirect to another server": reply(302, Location="http://elsewhere/"),
}
RPC: dict[str, Exception] = {
    "no connection to Modal": modal_errors.ConnectionError("no"),
    "Modal's token is wrong": modal_errors.AuthError("no"),
    "the app is not deployed": modal_errors.NotFoundError("no"),
    "the container is lost": modal_errors.InternalFailure("no"),
    "Modal's time limit": modal_errors.FunctionTimeoutError("no"),
}
ENGINE: dict[str, Any] = {
    "a text is too long": errors.InputTooLongError.of([errors.InvalidText(0, "is too long")]),
    "a vector is not finite": np.nan,
    "too much is queued": errors.ServiceUnavailableError("busy.", 0.01),
    "the engine died": errors.ContainerFailedError("died."),
    "the deadline passed in the queue": errors.DeadlineExceededError("late."),
    "a bug in the engine": RuntimeError("a bug"),
}
ENTRY_POINTS: dict[type[Any], str] = {
    KalmClient: "embed",
    KalmModalEmbeddings: "embed_documents",
    ours_for_llama_index.KalmModalEmbeddings: "get_text_embedding_batch",
}
Open = Callable[[type[Any]], Any]


class Engine(ScriptedEngine):
    """Fails `times` at the text "bad"."""

    def __init__(self, fault: Any, times: int) -> None:
        super().__init__()
        self._fault, self._times = fault, times

    async def embed(self, texts: Any, **options: Any) -> EngineOutput:
        output = await super().embed(texts, **options)
        if "bad" in texts and self._times:
            self._times -= 1
            if isinstance(self._fault, Exception):
                raise self._fault
            output.vectors[0, 3] = self._fault
        return output


@contextmanager
def over_http(fault: Any, times: int) -> Iterator[Open]:
    with FaultyServer([None, *[fault] * times]) as server:
        yield lambda kind: kind(base_url=server.url, **named(fault))


@contextmanager
def over_rpc(fault: Exception, times: int) -> Iterator[Open]:
    left, calls = times, 0

    async def call(fields: Any) -> Any:
        nonlocal left, calls
        calls += 1
        if calls > 1 and left:
            left -= 1
            raise fault
        return await rpc.embed_packed(service, fields)

    service = EmbeddingService(ScriptedEngine())
    with deployed(call):
        yield lambda kind: kind(backend="modal", **named(fault))


@contextmanager
def engine_over(transport: str, fault: Any, times: int) -> Iterator[Open]:
    service = EmbeddingService(Engine(fault, times))
    with ExitStack() as stack:
        options: dict[str, Any] = {"transport": InProcessTransport(service)}
        if transport == "HTTP":
            app = create_app(service, keys=BearerKeys(None))
            options = {"base_url": stack.enter_context(serving(app))}
        elif transport == "Modal RPC":
            stack.enter_context(deployed(lambda fields: rpc.embed_packed(service, fields)))
            options = {"backend": "modal"}
        yield lambda kind: kind(**options, **named(fault))


def deployed(call: Callable[[Any], Any]) -> Any:
    """Modal's handle of a class whose method is `call`."""

    async def hydrate() -> None: ...

    method = SimpleNamespace(hydrate=SimpleNamespace(aio=hydrate), remote=SimpleNamespace(aio=call))
    return patch.object(modal, "deployed", lambda _: SimpleNamespace(embed_packed=method))


def named(fault: Any) -> dict[str, Any]:
    """A client's options."""
    timeout = 0.5 if fault is stall else 30
    return {"model": EMBEDDED.space.model, "timeout": timeout, **OPTIONS}


def ending(call: Callable[[], int]) -> tuple[str, Any]:
    """The number of vectors, or the error's class and retries; and the error."""
    try:
        return str(call()), None
    except errors.KalmError as error:
        kind = next(each for each in type(error).__mro__ if each.__module__ == errors.__name__)
        retries = "outage" if getattr(error, "is_outage", False) else error.retries
        return f"`{kind.__name__}`" + (f" ({retries})" if retries else ""), error


def outcome(setting: Callable[[int], Any], cause: str) -> str:
    """The error and its retries, if `setting` causes a failure again and again. Checks what the
    page says of all failures."""
    always, survived = set(), set()
    for kind, method in ENTRY_POINTS.items():
        with setting(99) as opened, opened(kind) as client:
            ask = getattr(client, method)
            end, error = ending(lambda: len(ask(TEXTS)))  # noqa: B023
            always.add(end)
            assert error.partial is not None, (kind, repr(error))
            survived.add(len(error.partial))
    for on_error in ("raise", "skip"):
        with setting(99) as opened, opened(KalmClient) as client:
            rows = rejected = 0

            def read() -> int:
                nonlocal rows, rejected
                for part in client.iter_embed(TEXTS, on_error=on_error):  # noqa: B023
                    rows += len(part)
                    rejected += len(part.rejected)
                return rows

            end, error = ending(read)
            if on_error == "raise":  # the last one is "skip", below
                always.add(end)
                survived.add(rows)
    assert (rows, rejected, error is None) == ((3, 1, True) if cause in SKIPPED else (1, 0, False))
    assert survived == {1}, survived
    (found,) = always
    with setting(1) as opened, opened(KalmClient) as client:
        once, error = ending(lambda: len(client.embed(TEXTS).vectors))
    retried = "(" in found or found == "`NotDeployedError`"  # which is looked up again
    assert once == ("4" if retried else found), (cause, once, found)
    return found


def page() -> str:
    """docs/errors.md with a new table."""
    causes: dict[str, list[str]] = {}
    with patch.object(retry, "FIRST_DELAY", 0.001):
        for faults, setting in ((HTTP, over_http), (RPC, over_rpc)):
            for cause, fault in faults.items():
                found = outcome(lambda times: setting(fault, times), cause)  # noqa: B023
                causes.setdefault(found, []).append(cause)
        for cause, fault in ENGINE.items():
            (found,) = {
                outcome(lambda times: engine_over(transport, fault, times), cause)  # noqa: B023
                for transport in ("HTTP", "Modal RPC", "in process")
            }
            causes.setdefault(found, []).append(cause)
    rows = "".join(f"| {found} | {', '.join(names)} |\n" for found, names in causes.items())
    head = "| error | causes |"
    return f"{PAGE.read_text().partition(head)[0]}{head}\n|---|---|\n{rows}"


if __name__ == "__main__":
    text = page()
    if "--write" in sys.argv:
        PAGE.write_text(text)
    print(text)
