"""Groups of typed RPC handlers, joined into one gRPC service; the rest is UNIMPLEMENTED."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

import grpclib.server
from google.protobuf.message import Message
from grpclib import GRPCError, Status
from modal_proto import api_grpc

Stream = grpclib.server.Stream[Any, Any]
Admit = Callable[[str, Message, Stream, bool], Awaitable[None]]
"""Called with every request before its handler: name, request, stream, implemented."""

Unary = TypeVar("Unary", bound=Callable[..., Awaitable[Message]])
Streaming = TypeVar("Streaming", bound=Callable[..., AsyncIterator[Message]])


def unary(name: str) -> Callable[[Unary], Unary]:
    """Marks a method as the handler of a unary RPC."""

    def mark(method: Unary) -> Unary:
        method.__dict__["rpc"] = (name, False)
        return method

    return mark


def streaming(name: str) -> Callable[[Streaming], Streaming]:
    """Marks an async generator as the handler of an RPC that streams its answer."""

    def mark(method: Streaming) -> Streaming:
        method.__dict__["rpc"] = (name, True)
        return method

    return mark


def service(groups: Iterable[object], admit: Admit) -> api_grpc.ModalClientBase:
    """Builds the service whose RPCs are the marked methods of `groups`."""
    known = api_grpc.ModalClientBase.__abstractmethods__
    body: dict[str, Any] = {name: _refuse(name, admit) for name in known}
    bound: set[str] = set()
    for group in groups:
        for _, method in inspect.getmembers(group, inspect.ismethod):
            if (mark := getattr(method, "rpc", None)) is None:
                continue
            name, streams = mark
            if name not in known or name in bound:
                raise TypeError(f"{name}: not an RPC of this modal version, or bound twice")
            bound.add(name)
            body[name] = _answer(name, method, streams=streams, admit=admit)
    built: api_grpc.ModalClientBase = type("EmulatedService", (api_grpc.ModalClientBase,), body)()
    return built


def _answer(
    name: str, method: Callable[[Message], Any], *, streams: bool, admit: Admit
) -> Callable[[object, Stream], Awaitable[None]]:
    async def handle(_: object, stream: Stream) -> None:
        request = await stream.recv_message()
        await admit(name, request, stream, True)
        if streams:
            async for item in method(request):
                await stream.send_message(item)
        else:
            await stream.send_message(await method(request))

    return handle


def _refuse(name: str, admit: Admit) -> Callable[[object, Stream], Awaitable[None]]:
    async def handle(_: object, stream: Stream) -> None:
        await admit(name, await stream.recv_message(), stream, False)
        raise GRPCError(Status.UNIMPLEMENTED, f"the emulator does not implement {name}")

    return handle
