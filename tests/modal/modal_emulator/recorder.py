"""The log of requests, and the faults that tests inject into them."""

import collections
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from google.protobuf.message import Message

Fault: TypeAlias = Exception | Callable[[Message], Awaitable[None] | None] | None
"""Raised, or called with the request (it may raise, or wait); None lets one request pass."""


@dataclass(frozen=True)
class Request:
    """One RPC as it came in. `sender` is "client" or the id of a container's task."""

    sender: str
    name: str
    message: Message


class Recorder:
    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.unimplemented: collections.Counter[str] = collections.Counter()
        self.faults: dict[str, collections.deque[Fault]] = collections.defaultdict(
            collections.deque
        )

    async def admit(self, sender: str, name: str, message: Message, *, implemented: bool) -> None:
        self.requests.append(Request(sender, name, message))
        if not implemented:
            self.unimplemented[name] += 1
        if not self.faults[name]:
            return
        fault = self.faults[name].popleft()
        if isinstance(fault, Exception):
            raise fault
        if fault is not None:
            waiting = fault(message)
            if inspect.isawaitable(waiting):
                await waiting
