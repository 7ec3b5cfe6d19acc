"""One seed: callers of real clients, what they are owed, and whether they got it."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import virtual_time
from simulated_service import (
    OTHER_SPACE,
    TOO_LONG,
    WALL_CLOCK,
    BrokenError,
    Cluster,
    Network,
    broken,
    check,
    now,
    right_vector,
)

from kalm_integrations import KalmClient, client, errors, event_loop, retry, session
from kalm_integrations.event_loop import BackgroundLoop
from kalm_integrations.models import EMBEDDED
from kalm_integrations.native_threads import NativeFuture
from kalm_integrations.prompts import Role
from kalm_integrations.result import EmbeddedBatch
from kalm_integrations.transports import openai_compat
from modal_backend import admission, service

TEMPLATES: dict[Role, str] = {"query": "of a query: {text}", "document": "{text}"}
EPSILON = 1e-6


class _Background(BackgroundLoop):
    """The background event loop, which is the caller's own here."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()  # type: ignore[assignment]
        self.resources = set()
        self.process = os.getpid()
        self._thread: Any = SimpleNamespace(is_current=lambda: False)


class _Future(NativeFuture[Any]):
    """A set of these has the same order in every process."""

    def __init__(self) -> None:
        super().__init__()
        self._number = random.getrandbits(32)

    def __hash__(self) -> int:
        return self._number


@dataclass
class Plan:
    """What a seed decides."""

    calm: bool = field(default_factory=lambda: random.random() < 0.1)
    calls: int = field(default_factory=lambda: random.randint(1, 6))
    clients: int = field(default_factory=lambda: random.choice([1, 1, 2]))
    restarts: int = field(default_factory=lambda: random.choice([0, 0, 1, 2]))
    jumps: int = field(default_factory=lambda: random.choice([0, 0, 1, 2]))

    def __post_init__(self) -> None:
        if self.calm:
            self.restarts = self.jumps = 0

    def cluster(self) -> Cluster:
        faults = 0.0 if self.calm else random.choice([0.0, 0.0, 0.1, 0.4])
        small = not self.calm and random.random() < 0.3
        limits = {"query": 2, "document": 6} if small else admission.MAX_WAITING
        return Cluster(random.choice([0.001, 0.02, 0.2]), faults, dict(limits))  # type: ignore[arg-type]

    def network(self, cluster: Cluster) -> Network:
        faults = 0.0 if self.calm else random.choice([0.0, 0.1, 0.3, 0.7])
        limits = random.choice([0, 1, 2, 6]), random.choice([1, 2, 4])
        return Network(cluster, faults, limits)

    def client(self, network: Network) -> KalmClient:
        return KalmClient(
            transport=network,
            model=EMBEDDED.space.model,
            query_instruction=TEMPLATES["query"],
            max_retries=network.max_retries,
            max_concurrency=network.max_concurrency,
            batch_size=random.choice([1, 2, 3]),
            timeout=600.0 if self.calm else random.choice([0.4, 2.0, 10.0, 60.0]),
        )


@dataclass
class Call:
    """A caller: what it asks for, and when."""

    number: int
    client: KalmClient
    network: Network
    simulation: Simulation
    role: Role = "document"
    start: float = field(default_factory=lambda: random.choice([0.0, 0.0, random.uniform(0, 3)]))
    how: str = field(default_factory=lambda: random.choice(["embed", "lists", "raise", "skip"]))
    leaves: float | None = None
    """When it is cancelled, or stops reading."""
    begun: float = 0.0
    outcome: str = "running"

    def __post_init__(self) -> None:
        count = random.randint(1, 7)
        if random.random() < 0.4:
            self.role, self.how, count = "query", random.choice(["embed", "lists"]), 1
        self.texts = [f"{self.number} {random.randrange(count)}" for _ in range(count)]
        if not self.simulation.plan.calm and random.random() < 0.1:
            self.texts[random.randrange(count)] += TOO_LONG
        if not self.simulation.plan.calm and random.random() < 0.2:
            self.leaves = self.start + random.uniform(0, 1)

    async def run(self) -> None:
        await asyncio.sleep(self.start)
        task = asyncio.create_task(self._ask())
        queries = self.simulation.queries
        free = queries[id(self.client)] < self.network.max_concurrency
        queries[id(self.client)] += self.role == "query"
        prompted = TEMPLATES[self.role].format(text=self.texts[0])
        for _ in range(12 if free and self.role == "query" else 0):
            await asyncio.sleep(0)
            if self.network.attempts[(prompted,)] or task.done():
                break
        else:
            check(not (free and self.role == "query"), "a query waited for documents in the client")
        if self.leaves is not None:
            await asyncio.wait([task], timeout=max(0.0, self.leaves - now()))
            left = now()
            task.cancel()
            await asyncio.wait([task])
            self.simulation.check_deadline(left)
        try:
            await task
            self.outcome = "answered"
        except asyncio.CancelledError:
            check(self.leaves is not None, "a call was cancelled that nobody left")
            self.outcome = "left"
        except errors.KalmError as error:
            self.outcome = error.code
            if self.how in ("embed", "lists"):
                self._check_rows(error.partial.indices.tolist(), error.partial.vectors)  # type: ignore[union-attr]
        finally:
            queries[id(self.client)] -= self.role == "query"
        if self.how in ("embed", "lists"):
            self.simulation.check_deadline(self.begun + self.client.config.timeout)

    async def _ask(self) -> None:
        everything, self.begun = range(len(self.texts)), now()
        if self.how == "embed":
            result = await self.client.aembed(self.texts, role=self.role)
            self._check_rows(everything, result.vectors)
        elif self.how == "lists":
            lists = await self.client.aembed_to_lists(self.texts, role=self.role)
            self._check_rows(everything, lists)
        else:
            parts = self.client.aiter_embed(
                self.texts, role=self.role, on_error="skip" if self.how == "skip" else "raise"
            )
            await self._read(parts)

    async def _read(self, parts: AsyncGenerator[EmbeddedBatch]) -> None:
        got: Counter[int] = Counter()
        async with aclosing(parts):
            async for part in parts:
                self._check_rows(part.indices.tolist(), part.vectors)
                got.update(part.indices.tolist())
                got.update(each.index for each in part.rejected)
                check(not got or max(got.values()) == 1, f"a row came twice: {got}")
                await asyncio.sleep(random.choice([0.0, 0.0, 0.05]))
        check(len(got) == len(self.texts), f"rows were lost: {got} of {len(self.texts)}")

    def _check_rows(self, indices: Any, rows: Any) -> None:
        check(len(indices) == len(rows), "rows were lost")
        for index, row in zip(indices, rows, strict=True):
            right = right_vector(TEMPLATES[self.role].format(text=self.texts[index]))
            check(np.array_equal(np.asarray(row), right), f"a wrong vector for texts[{index}]")


class Simulation:
    """All that happens in one seed."""

    def __init__(self) -> None:
        self.plan = Plan()
        self.jumps: list[tuple[float, float]] = []
        self.queries: Counter[int] = Counter()
        self.cluster = self.plan.cluster()
        self.networks = [self.plan.network(self.cluster) for _ in range(self.plan.clients)]
        clients = [(self.plan.client(network), network) for network in self.networks]
        for network in self.networks:
            network.on_end = self.check_deadline
        self.calls = [Call(n, *random.choice(clients), self) for n in range(self.plan.calls)]
        self.clients = [each for each, _ in clients]

    async def run(self) -> None:
        loop: Any = asyncio.get_running_loop()
        loop.background = _Background()
        self.cluster.start()
        events: list[Coroutine[Any, Any, None]] = [call.run() for call in self.calls]
        events += [self._restart() for _ in range(self.plan.restarts)]
        events += [self._jump() for _ in range(self.plan.jumps)]
        await asyncio.gather(*events)
        if self.cluster.tasks:
            await asyncio.wait(self.cluster.tasks)
        await asyncio.sleep(1)
        for each in self.clients:
            self._check_slots(each)
            await each.aclose()
        self._check_leaks(loop)
        for network in self.networks:
            network.check_retries()
        if self.plan.calm:
            check({call.outcome for call in self.calls} == {"answered"}, "failed without a fault")
            check(
                all(set(n.attempts.values()) <= {1} for n in self.networks), "retried without need"
            )

    def check_deadline(self, deadline: float) -> None:
        """Check that it is not later than `deadline`, unless the clock has just jumped past it."""
        time = now()
        late = time > deadline + EPSILON
        jumped = any(
            before <= deadline + EPSILON and time <= after + EPSILON for before, after in self.jumps
        )
        check(not late or jumped, f"{time - deadline:.3f} s after the deadline")

    async def _jump(self) -> None:
        await asyncio.sleep(random.uniform(0, 4))
        before, seconds = now(), random.choice([0.5, 5.0, 100.0])
        if self.jumps and before <= self.jumps[-1][1] + EPSILON:
            before = self.jumps.pop()[0]
        self.jumps.append((before, now() + seconds))
        asyncio.get_running_loop().jump(seconds)  # type: ignore[attr-defined]

    async def _restart(self) -> None:
        await asyncio.sleep(random.uniform(0, 4))
        space = OTHER_SPACE if random.random() < 0.2 else EMBEDDED.space
        await self.cluster.restart(random.choice([0.0, 0.3, 3.0, 30.0]), space)

    def _check_slots(self, client: KalmClient) -> None:
        if (opened := client._dispatcher._session) is not None:
            for slots in opened._slots.values():
                check(slots._value == client.config.max_concurrency, "a slot was not returned")

    def _check_leaks(self, loop: Any) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        check(not tasks, f"tasks are left: {tasks}")
        timers = [timer for timer in loop._scheduled if not timer.cancelled()]
        check(not timers, f"timers are left: {timers}")
        check(not loop.background.resources, "a session was not closed")
        check(not any(network.running for network in self.networks), "a request is left")
        for each in self.cluster.services:
            control = each.admission
            check(not any(control.texts_in_progress.values()), "texts are counted that left")
            check(not any(control._outstanding.values()), "work is counted that left")
            check(not each.engine.lock._holders, "the engine's lock is held")  # type: ignore[attr-defined]


def patches() -> Any:
    """The clock and the background loop of the modules; for as many seeds as one likes."""
    clock = SimpleNamespace(monotonic=now, time=lambda: WALL_CLOCK + now())
    stack = [
        patch.object(module, "time", clock)
        for module in (client, session, retry, service, openai_compat)
    ]
    stack.append(patch.object(event_loop, "NativeFuture", _Future))
    stack.append(
        patch(
            "kalm_integrations.dispatch.background_loop",
            lambda: asyncio.get_running_loop().background,  # type: ignore[attr-defined]
        )
    )
    return stack


def simulate(seed: int) -> Simulation:
    """Run one seed, within `patches`.

    Raises:
        BrokenError: A guarantee was.
    """
    random.seed(seed)
    broken.clear()
    simulation = Simulation()
    try:
        virtual_time.run(simulation.run())
    finally:
        if broken:  # the first one, whatever came of it
            raise BrokenError(broken[0])
    return simulation
