"""Client and service together, in virtual time, under the faults of many seeds.

`make simulate` runs 10,000 seeds, `SEED=n make simulate` one, exactly as it ran before.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import simulated_service
from simulated_calls import Simulation, patches, simulate
from simulated_service import BrokenError

from kalm_integrations import codec, errors, session
from kalm_integrations.batching import Batch
from kalm_integrations.prompts import Role
from kalm_integrations.protocol import EmbedRequest
from kalm_integrations.response_validator import ResponseValidator
from kalm_integrations.result import EmbeddedBatch, Usage
from kalm_integrations.retry import RetryPolicy
from modal_backend.admission import Admission, AdmittedRequest

SEEDS = int(os.environ.get("SEEDS", "300"))
ONE = os.environ.get("SEED")


@pytest.fixture(autouse=True)
def in_virtual_time() -> Iterator[None]:
    logging.disable()
    with ExitStack() as stack:
        stack.callback(logging.disable, logging.NOTSET)
        for each in patches():
            stack.enter_context(each)
        yield


def run(seed: int) -> Simulation:
    try:
        return simulate(seed)
    except BaseException as error:
        error.add_note(f"Repeat it: SEED={seed} make simulate")
        raise


def test_no_seed_breaks_a_guarantee() -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(SEEDS) if ONE is None else [int(ONE)]:
        outcomes.update(call.outcome for call in run(seed).calls)
    print(f"\n| {outcomes.total():,} calls | ended as |\n|---|---|")
    print(*(f"| {n:,} | {end} |" for end, n in outcomes.most_common()), sep="\n")
    if ONE is None:  # the seeds reach what they are for
        assert outcomes["answered"] > outcomes.total() / 3
        assert len(outcomes) > 8


def test_a_seed_repeats_exactly() -> None:
    for seed in range(5):
        first, second = ([n.trace for n in run(seed).networks] for _ in range(2))
        assert first == second


def _scattered_in_reverse(self: Batch, vectors: Any, usage: Usage) -> EmbeddedBatch:
    return SCATTER(Batch(self.texts, self.positions[::-1]), vectors, usage)


def _one_half_twice(self: Batch) -> tuple[Batch, Batch]:
    return (HALVES(self)[0],) * 2


@contextmanager
def _leaking(self: Admission, role: Role, texts: Any, deadline: float | None) -> Iterator[Any]:
    self.texts_in_progress[role] += len(texts)
    yield AdmittedRequest(self, role, [float(n) for n in range(len(texts) + 1)], deadline)
    self.texts_in_progress[role] -= len(texts)  # not after a failure


def _without_budget(self: RetryPolicy, most: int, concurrency: int) -> None:
    POLICY(self, most, 1000 * concurrency)
    self._patience = 0.0


def _one_lane(self: session.Session, *args: Any) -> None:
    SESSION(self, *args)
    self._slots["query"] = self._slots["document"]


SCATTER, HALVES, POLICY, SESSION = (
    Batch.scatter,
    Batch.halves,
    RetryPolicy.__init__,
    session.Session.__init__,
)
MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "no digest": (EmbedRequest, "digest", lambda _: "0" * 32),
    "no checksum": (codec, "_checksum", lambda *_: b"0" * 16),
    "no identity": (ResponseValidator, "check_identity", lambda *_: None),
    "rows in reverse": (Batch, "scatter", _scattered_in_reverse),
    "one half twice": (Batch, "halves", _one_half_twice),
    "no deadline": (session.asyncio, "timeout", lambda _: asyncio.timeout_at(1e9)),
    "no budget": (RetryPolicy, "__init__", _without_budget),
    "any error is retried": (errors.KalmError, "retryable", True),
    "shared slots": (session.Session, "__init__", _one_lane),
    "no priority": (simulated_service, "PRIORITY", {"query": 0, "document": 0}),
    "texts stay counted": (Admission, "admit", _leaking),
}


@pytest.mark.skipif(ONE is not None, reason="runs one seed")
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTATIONS[name])
    with pytest.raises(BrokenError) as caught:
        for seed in range(600):
            run(seed)
    print(f"{name}: {caught.value} {caught.value.__notes__[0]}")
