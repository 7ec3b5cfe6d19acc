"""Bodies and answers of the HTTP API: long ones in parts, errors as JSON, a hint where nothing is
served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterable
from typing import Final, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from kalm_integrations.errors import (
    ConfigurationError,
    KalmError,
    NotFoundError,
    RequestTooLargeError,
)
from modal_backend.http.headers import quoted
from modal_backend.http.schema import error_headers, render_error

T = TypeVar("T")
Part = bytes | memoryview

_PATHS: Final = {
    path.rpartition("/")[2]: path
    for path in (
        "/v1/embeddings",
        "/v1/models",
        "/ready",
        "/metrics",
        "/health",
        "/openapi.json",
    )
}


def response(parts: Iterable[Part], media_type: str, *, short: bool) -> Response:
    """An answer that is sent in one go if it is short, or part by part, so that the event loop can
    do other work in between."""
    if short:
        return Response(b"".join(parts), media_type=media_type)
    return StreamingResponse(_one_by_one(parts), media_type=media_type)


async def _one_by_one(parts: Iterable[Part]) -> AsyncIterator[Part]:
    for part in parts:
        yield part
        await asyncio.sleep(0)


def error_response(error: KalmError, headers: dict[str, str] | None = None) -> Response:
    """An error as OpenAI's JSON.

    Args:
        error: What happened.
        headers: By default those of `error_headers`.
    """
    headers = error_headers(error) if headers is None else headers
    return Response(render_error(error), error.status, headers, "application/json")


async def read_body(request: Request, most: int) -> bytearray:
    """The body of a request.

    Raises:
        ConfigurationError: It is compressed.
        RequestTooLargeError: It has more bytes than `most`; the rest is not read.
    """
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise ConfigurationError("a compressed body: send it as it is.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise RequestTooLargeError(f"a body over {most:,} bytes.")
    return body


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the caller disconnects first.

    Raises:
        ClientDisconnect: The caller disconnected.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def no_such_route(request: Request, error: Exception) -> Response:
    """The answer to a path or method that is not served. Names the path that was probably meant: a
    redirect would make some clients send their texts again in clear text, from behind a proxy that
    speaks TLS."""
    assert isinstance(error, HTTPException)
    path, headers = request.url.path, dict(error.headers or {})
    if allowed := headers.get("Allow") or headers.get("allow"):
        message = f"{request.method} is not allowed at {quoted(path)}; use {allowed}."
    else:
        known = [_PATHS[name] for name in path.lower().split("/") if name in _PATHS]
        hint = f": the path is {known[-1]}" if known else ""
        message = f"nothing is served at {quoted(path)}{hint}."
    request.state.end = NotFoundError.code
    answer = error_response(NotFoundError(message), headers)
    answer.status_code = error.status_code
    return answer


async def nobody_listens(request: Request, _: Exception) -> Response:
    """The answer to a caller who disconnected. Only the access log sees it."""
    request.state.end = "caller_left"
    return Response(status_code=499)  # nginx's
