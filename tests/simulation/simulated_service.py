"""A service and a network in virtual time. Python's `random` decides what fails, and when.

The service, its admission control, its priorities, the encoding of requests and responses and the
translation of a gateway's errors are the real ones. The engine knows the right vector of each text.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from typing import Any, Final

import numpy as np
from multidict import CIMultiDict
from scripted import vector_of
from scripted_engine import ScriptedEngine
from yarl import URL

from kalm_integrations import errors
from kalm_integrations.codec import unpack
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import EMBEDDED
from kalm_integrations.prompts import Role
from kalm_integrations.protocol import (
    EmbedRequest,
    EmbedResponse,
    ServiceDescription,
    error_from_fields,
)
from kalm_integrations.transports.http_pool import HttpResponse
from kalm_integrations.transports.openai_compat import error_from_response
from modal_backend import rpc
from modal_backend.admission import Admission
from modal_backend.engines import priority_lock
from modal_backend.engines.base import PRIORITY, EngineOutput, Progress, no_progress, within
from modal_backend.service import EmbeddingService

OTHER_SPACE: Final = dataclasses.replace(EMBEDDED.space, revision="another")
TOO_LONG: Final = " too long"
WALL_CLOCK: Final = 1_800_000_000.0
STALL: Final = 1e6
RETRYABLE: Final = [kind for kind in errors.subclasses(errors.KalmError) if kind.retryable]

right_vector = lru_cache(maxsize=8192)(vector_of)


def now() -> float:
    return asyncio.get_running_loop().time()


class BrokenError(AssertionError):
    """A guarantee was broken."""


broken: list[str] = []
"""What `check` found: the client and the service catch exceptions of transports and engines."""


def check(condition: object, message: str) -> None:
    if not condition:
        broken.append(message)
        raise BrokenError(message)


class Engine(ScriptedEngine):
    """Computes chunks one after the other, queries first; slow or failing as the seed decides."""

    def __init__(self, space: SpaceIdentity, seconds: float, faults: float) -> None:
        super().__init__()
        self.identity = space
        self.lock = priority_lock.PriorityLock()
        self._seconds = seconds
        self._faults = faults
        self._documents_begun = 0

    async def embed(
        self,
        texts: Sequence[str],
        *,
        role: Role,
        truncate: Any,
        deadline: float | None,
        progress: Progress = no_progress,
    ) -> EngineOutput:
        fault = random.random() < self._faults and random.choice(
            ["slow", "unavailable", "container", "foreign", "not finite", "length", "rows"]
        )
        if invalid := [i for i, text in enumerate(texts) if TOO_LONG in text]:
            raise errors.InputTooLongError.of([errors.InvalidText(i, TOO_LONG) for i in invalid])
        if fault == "unavailable":
            raise errors.ServiceUnavailableError("the engine is busy.", random.choice([None, 0.1]))
        if fault == "container":
            raise errors.ContainerFailedError("the engine died.")
        if fault == "foreign":
            raise RuntimeError("a bug")
        async with within(deadline):
            await self._compute(texts, role, progress, 20 if fault == "slow" else 1)
        salt = "" if self.identity == EMBEDDED.space else self.identity.revision
        vectors = np.array([right_vector(salt + text, "float32") for text in texts])
        if fault == "not finite":
            vectors[random.randrange(len(texts)), 5] = np.nan
        if fault == "length":
            vectors[random.randrange(len(texts))] *= 1.5
        return EngineOutput(vectors[1:] if fault == "rows" else vectors, len(texts))

    async def _compute(
        self, texts: Sequence[str], role: Role, progress: Progress, factor: float
    ) -> None:
        ticket, begun = self.lock.ticket(PRIORITY[role]), self._documents_begun
        for start, chunk in priority_lock.chunks(texts, max_texts=2, max_tokens=4096):
            async with self.lock.hold(ticket):
                self._documents_begun += role == "document"
                if role == "query":  # one may have got the lock just before
                    check(self._documents_begun <= begun + 1, "documents went before a query")
                progress(start)
                await asyncio.sleep(factor * self._seconds * len(chunk))
        progress(len(texts))


@dataclass
class Cluster:
    """The service's address: restarted, moved to another model, or down, as the seed decides."""

    engine_seconds: float
    engine_faults: float
    limits: dict[Role, int]
    services: list[EmbeddingService] = field(default_factory=list)
    is_up: bool = True
    tasks: dict[asyncio.Task[dict[str, Any]], None] = field(default_factory=dict)  # in order
    answers: list[bytes] = field(default_factory=list)
    swapping: asyncio.Future[bytes] | None = None

    def start(self, space: SpaceIdentity = EMBEDDED.space) -> None:
        engine = Engine(space, self.engine_seconds, self.engine_faults)
        self.services.append(EmbeddingService(engine, Admission(self.limits, clock=now)))
        self.is_up = True

    async def restart(self, seconds: float, space: SpaceIdentity) -> None:
        self.is_up = False
        for task in list(self.tasks):
            task.cancel()
        await asyncio.sleep(seconds)
        self.start(space)

    async def answer(self, fields: dict[str, Any], *, cancels: bool) -> dict[str, Any]:
        """The service's response; `cancels`: it notices when its caller leaves."""
        task = asyncio.create_task(rpc.embed_packed(self.services[-1], fields))
        self.tasks[task] = None
        task.add_done_callback(self.tasks.pop)
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            if cancels:
                task.cancel()
            raise
        if task.cancelled():
            raise errors.ConnectionFailedError("reset: the service was stopped.")
        return task.result()

    async def swapped(self, packed: bytes) -> bytes:
        """The response to another caller, who gets this one; or this one, if nobody comes."""
        waiting, self.swapping = self.swapping, None
        if waiting is not None and not waiting.done():
            waiting.set_result(packed)
            return random.choice(self.answers)
        self.swapping = asyncio.get_running_loop().create_future()
        try:
            return await asyncio.wait_for(self.swapping, 0.3)
        except TimeoutError:
            return packed


class Network:
    """A client's transport: carries encoded requests to the cluster, and notes what it sees.

    Args:
        cluster: Where the service is.
        faults: Probability that a request meets one.
        limits: `max_retries` and `max_concurrency` of the client.
    """

    can_be_cold = True

    def __init__(self, cluster: Cluster, faults: float, limits: tuple[int, int]) -> None:
        self._cluster = cluster
        self._faults = faults
        self.max_retries, self.max_concurrency = limits
        self.attempts: Counter[tuple[str, ...]] = Counter()
        self.outages: Counter[tuple[str, ...]] = Counter()
        self.final: set[tuple[str, ...]] = set()
        self.running: dict[tuple[str, ...], Role] = {}
        self.successes = 0
        self.trace: list[tuple[Any, ...]] = []
        """Time, text, and what became of it, of each attempt."""
        self.on_end: Callable[[float], None] = lambda deadline: None
        """Called at the end of each attempt, with its deadline."""

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        key = tuple(request.texts)
        check(key not in self.running, "a request was sent twice at a time")
        check(key not in self.final, "a request was retried after an error that is final")
        assert request.timeout is not None
        deadline = now() + request.timeout
        self.attempts[key] += 1
        self.running[key] = request.role
        check(
            Counter(self.running.values())[request.role] <= self.max_concurrency,
            "more requests than max_concurrency",
        )
        outcome = "cancelled"
        try:
            response = await self._exchange(request)
            outcome = "answered"
            self.successes += 1
            return response
        except errors.KalmError as error:
            outcome = error.code
            self.outages[key] += getattr(error, "is_outage", False)
            if type(error) not in RETRYABLE:
                self.final.add(key)
            raise
        except ValueError:
            outcome = "foreign"
            self.final.add(key)
            raise
        finally:
            del self.running[key]
            self.trace.append((now(), key[0], outcome))
            self.on_end(deadline)

    async def ensure_ready(self) -> ServiceDescription:
        if not self._cluster.is_up:
            raise _refused()
        return ServiceDescription(self._cluster.services[-1].identity)

    async def close(self) -> None:
        """Nothing is open."""

    def check_retries(self) -> None:
        """Check that no request was retried too often, nor all of them together."""
        retries = {key: attempts - 1 - self.outages[key] for key, attempts in self.attempts.items()}
        check(max(retries.values(), default=0) <= self.max_retries, "over max_retries")
        budget = self.max_retries * self.max_concurrency + 0.2 * self.successes
        counted = sum(max(0, number) for number in retries.values())
        check(counted <= budget, f"{counted} retries, over the budget of {budget}")

    async def _exchange(self, request: EmbedRequest) -> EmbedResponse:
        fault = random.random() < self._faults and random.choice(FAULTS)
        await asyncio.sleep(random.choice([0.0, 0.001, 0.02, 0.3]))
        if not self._cluster.is_up:
            raise _refused()
        if fault in BEFORE:
            await BEFORE[fault]()
        fields = json.loads(json.dumps(dataclasses.asdict(request)))
        answer = await self._cluster.answer(fields, cancels=random.random() < 0.5)
        await asyncio.sleep(random.choice([0.0, 0.001, 0.02]))
        if fault == "reset after":
            raise errors.ConnectionFailedError("reset.")
        if "error" in answer:
            raise error_from_fields({} if fault == "odd error" else answer["error"])
        packed = answer["packed"]
        if fault == "swapped":
            packed = await self._cluster.swapped(packed)
        elif fault == "stale" and self._cluster.answers:
            packed = random.choice(self._cluster.answers)
        elif fault == "truncated":
            packed = packed[: random.randrange(len(packed))]
        elif fault == "flipped bit":
            packed = bytearray(packed)
            packed[random.randrange(len(packed))] ^= 1 << random.randrange(8)
        self._cluster.answers.append(bytes(answer["packed"]))
        return unpack(bytes(packed))


def _refused() -> errors.KalmError:
    error = errors.ConnectionFailedError("connection refused.")
    error.is_outage = True
    return error


async def _reset() -> None:
    raise errors.ConnectionFailedError("reset.")


async def _stall() -> None:
    await asyncio.sleep(STALL)


async def _gateway() -> None:
    seconds = random.choice([0, 1, 5])
    headers = random.choice(
        [
            {},
            {},
            {"Retry-After": str(seconds)},
            {"Retry-After": "soon"},
            {"Retry-After-Ms": "150"},
            {"Retry-After": formatdate(WALL_CLOCK + now() + seconds, usegmt=True)},
        ]
    )
    status = random.choice([408, 409, 425, 429, 429, 500, 502, 503, 503, 504, 521])
    raise _response(status, headers, random.choice([b"", b"<html>", b'{"error": {"message": 5}}']))


async def _refusal() -> None:
    raise _response(random.choice([400, 401, 403, 404, 422]), {}, b"no")


async def _too_large() -> None:
    raise _response(413, {}, b"")


async def _foreign() -> None:
    raise ValueError("of a transport with a bug")


def _response(status: int, headers: dict[str, str], body: bytes) -> errors.KalmError:
    url = URL("http://kalm.example/v1/embeddings")
    return error_from_response(
        HttpResponse(status, CIMultiDict(headers), bytearray(body), "1", url), []
    )


BEFORE: dict[str | bool, Callable[[], Awaitable[None]]] = {
    "reset before": _reset,
    "stall": _stall,
    "gateway": _gateway,
    "refusal": _refusal,
    "too large": _too_large,
    "foreign": _foreign,
}
DAMAGED = ["reset after", "odd error", "swapped", "stale", "truncated", "flipped bit"]
FAULTS = [*BEFORE, *["gateway", "too large", "reset before"] * 3, *DAMAGED, *DAMAGED]
