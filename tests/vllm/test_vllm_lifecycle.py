"""Sleep, close and death of a real vLLM engine, and the errors that callers get."""

from __future__ import annotations

import asyncio
import gc
import logging
import traceback
import weakref
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch
from running import SMALL, children, embed, left_behind, running
from vllm import device_allocator
from vllm.device_allocator import AllocationData
from vllm.platforms import current_platform

from kalm_integrations.errors import (
    ContainerFailedError,
    EngineLoadError,
    KalmError,
    ServiceUnavailableError,
)
from kalm_integrations.protocol import EmbedRequest
from modal_backend import canary
from modal_backend.engines.vllm import engine as vllm_engine
from modal_backend.engines.vllm.config import VLLMOptions
from modal_backend.engines.vllm.engine import VLLMEngine
from modal_backend.engines.vllm.extension import WorkerExtension
from modal_backend.lifecycle import Lifecycle
from modal_backend.weights import locate

pytestmark = pytest.mark.asyncio(loop_scope="session")

TEXTS = [f"text {number} " * 20 for number in range(20)]
CALLS = 30
HANGS = 120.0
"""Seconds after which a wait has hung; no measure of how soon a death is noticed."""
LINES = 60
"""Most lines that a death may leave in the logs, all processes and libraries together."""


class Log(logging.Handler):
    """All that would be logged, vLLM's own lines included, at the level that it has by default."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += self.format(record) + "\n"

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


@pytest.fixture
def log() -> Iterator[Log]:
    handler = Log()
    loggers = [logging.getLogger(name) for name in (None, "vllm")]  # vLLM's does not propagate
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield handler
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def core_of(engine: VLLMEngine) -> psutil.Process:
    (core,) = engine._llm.engine_core.resources.engine_manager.processes
    return psutil.Process(core.pid)


async def at_work(calls: list[asyncio.Task[Any]], engine: VLLMEngine) -> None:
    """Wait until vLLM has texts of the calls."""
    async with asyncio.timeout(HANGS):
        while not engine._llm.get_num_unfinished_requests():
            await asyncio.sleep(0.001)
    assert not any(call.done() for call in calls)


def is_ours(error: BaseException) -> bool:
    """Neither an exception of vLLM's, nor with one in its chain or its traceback."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    chain = [cause for cause in (error.__cause__, error.__context__) if cause is not None]
    return (
        isinstance(error, KalmError | asyncio.CancelledError)
        and not any("site-packages/vllm/" in name for name in frames)
        and all(is_ours(cause) for cause in chain)
    )


async def within(seconds: float, work: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(work, seconds)


# --- asleep and awake


async def test_wake_without_sleep_does_nothing(engine: VLLMEngine) -> None:
    await engine.wake()
    await engine.wake()
    assert len((await embed(engine, TEXTS)).vectors) == len(TEXTS)


async def test_sleep_on_a_cpu_is_logged_and_keeps_the_vectors(
    engine: VLLMEngine, caplog: pytest.LogCaptureFixture
) -> None:
    before = (await embed(engine, TEXTS)).vectors
    for _ in range(2):
        await engine.sleep()
    assert caplog.text.count("this platform has no sleep mode") == 1
    assert not await engine._llm.is_sleeping()
    for _ in range(2):
        await engine.wake()
    assert np.array_equal((await embed(engine, TEXTS)).vectors, before)


async def test_a_sleeping_engine_refuses_texts_with_a_retry(engine: VLLMEngine) -> None:
    await engine.sleep()
    with pytest.raises(ServiceUnavailableError, match="the engine is asleep") as error:
        await embed(engine, TEXTS)
    assert error.value.retry_after == 1
    await engine.wake()
    await embed(engine, TEXTS)


async def test_calls_in_progress_finish_before_sleep(engine: VLLMEngine, with_sleep: None) -> None:
    calls = [asyncio.create_task(embed(engine, TEXTS)) for _ in range(5)]
    await at_work(calls, engine)
    for _ in range(2):
        await engine.sleep()
    assert await engine._llm.is_sleeping()
    assert engine._llm.get_num_unfinished_requests() == 0
    assert all(call.done() for call in calls)
    assert [len((await call).vectors) for call in calls] == [len(TEXTS)] * 5
    for _ in range(2):
        await engine.wake()
    assert not await engine._llm.is_sleeping()
    await embed(engine, TEXTS)


@pytest.fixture
def with_sleep(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    enable_sleep(engine, monkeypatch)


def enable_sleep(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's level 0 in place of level 1: it stops computing, and moves no memory, which is all
    that a CPU cannot do."""
    sleep = engine._llm.sleep
    monkeypatch.setattr(engine, "_can_sleep", True)
    monkeypatch.setattr(engine._llm, "sleep", lambda level, mode: sleep(0 * level, mode))


async def test_host_copies_of_the_weights_are_freed_only_before_the_next_sleep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a stand-in for vLLM's allocator, which needs a GPU."""
    allocation = AllocationData((0, 8, 0, 0), "weights", torch.ones(8))
    allocator = SimpleNamespace(pointer_to_data={0: allocation})
    monkeypatch.setattr(device_allocator, "get_mem_allocator_instance", lambda: allocator)
    monkeypatch.setattr(type(current_platform), "is_sleep_mode_available", lambda *_: True)
    copy = weakref.ref(allocation.cpu_backup_tensor)
    worker = WorkerExtension()
    worker.keep_host_copies()
    allocation.cpu_backup_tensor = None  # what vLLM does when it is copied back
    assert copy() is not None
    worker.free_host_copies()
    assert copy() is None


# --- closed


async def test_closing_the_engine_fails_calls_in_progress_once(gemma: Path, log: Log) -> None:
    before = children()
    async with running(gemma) as engine:
        gc.unfreeze()
        objects = len(gc.get_objects())
        await engine.warm_up()
        # Python's collector does not look through what a warm engine holds.
        assert len(gc.get_objects()) < objects / 50
        llm = weakref.ref(engine._llm)
        calls = [asyncio.create_task(embed(engine, TEXTS)) for _ in range(CALLS)]
        await at_work(calls, engine)
        await asyncio.gather(engine.close(), engine.close())
        ended = await within(HANGS, asyncio.gather(*calls, return_exceptions=True))
        assert [type(error) for error in ended] == [ServiceUnavailableError] * CALLS
        assert {str(error).split(".")[0] for error in ended} == {"the service is stopping"}
        assert {error.retry_after for error in ended} == {1.0}
        assert len(set(map(id, ended))) == CALLS
        assert all(map(is_ours, ended))
        await engine.close()
        for act in (partial(embed, engine, TEXTS), engine.sleep, engine.wake, engine.warm_up):
            with pytest.raises(EngineLoadError, match="the engine is closed"):
                await act()
    assert left_behind(before) == set()
    assert len(gc.get_objects()) > objects / 2
    gc.collect()
    assert llm() is None
    assert "Traceback" not in log.text
    assert len(log.lines) <= LINES


# --- killed


@dataclass
class Container:
    """A container's life cycle, and its engines so far."""

    life: Lifecycle
    before: set[int]
    engines: list[VLLMEngine] = field(default_factory=list)
    wake_error: BaseException | None = None


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def container(gemma: Path) -> AsyncIterator[Container]:
    """Prepared, its sleeping core killed in the snapshot, and resumed."""

    async def load() -> VLLMEngine:
        container.engines.append(await VLLMEngine.load(locate(str(gemma)), VLLMOptions(**SMALL)))
        return container.engines[-1]

    container = Container(Lifecycle(load, "asleep"), children())
    await container.life.prepare()
    assert container.life.failure is None
    (engine,) = container.engines
    with pytest.MonkeyPatch.context() as patch:
        enable_sleep(engine, patch)
        core = core_of(engine)
        core.suspend()  # so that it is asked, and never answers
        waking = asyncio.create_task(engine.wake())
        await asyncio.sleep(0.1)
        assert not waking.done()
        core.kill()
        done, _ = await asyncio.wait({waking}, timeout=HANGS)
        container.wake_error = waking.exception() if done else None
        waking.cancel()
        await asyncio.gather(waking, return_exceptions=True)
    await container.life.resume()
    yield container
    await container.life.close()
    assert left_behind(container.before) == set()


async def test_wake_fails_when_the_core_dies(container: Container) -> None:
    assert isinstance(container.wake_error, ContainerFailedError)
    assert is_ours(container.wake_error)
    assert "SIGKILL" in str(container.wake_error)


async def test_an_engine_that_died_in_the_snapshot_is_loaded_again(container: Container) -> None:
    assert container.life.failure is None
    assert len(container.engines) == 2
    first, again = ["load", "warm_up", "canary", "sleep", "wake"], ["load", "warm_up", "canary"]
    assert list(container.life.phases) == first + [f"{phase}_again" for phase in again]
    await canary.check(container.life.service.engine)


async def test_killing_the_core_fails_calls_once_and_requests_a_replacement(
    container: Container,
    log: Log,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each call gets one retryable error, the container is replaced once, the log stays short, and
    no process remains."""
    life, engine = container.life, container.engines[-1]
    replacements = 0

    async def request_replacement() -> None:
        nonlocal replacements
        replacements += 1

    assert vllm_engine.LIVENESS_SECONDS < 0.5
    # As early as can be: the engine is closed before vLLM has told the calls.
    monkeypatch.setattr(vllm_engine, "LIVENESS_SECONDS", 0.0)
    watching = asyncio.create_task(life.watch(request_replacement))
    requests = [EmbedRequest(texts=TEXTS, role="document") for _ in range(CALLS)]
    calls = [asyncio.create_task(life.service.embed(request)) for request in requests]
    await at_work(calls, engine)
    capfd.readouterr()
    log.text = ""
    core_of(engine).kill()
    async with asyncio.timeout(HANGS):
        while life.failure is None:
            await asyncio.sleep(0.01)
    ended = await within(HANGS, asyncio.gather(*calls, return_exceptions=True))
    await within(HANGS, watching)

    assert isinstance(life.failure, ContainerFailedError)
    assert replacements == 1
    assert [type(error) for error in ended] == [ContainerFailedError] * CALLS
    assert {error.status for error in ended} == {503}
    assert len(set(map(id, ended))) == CALLS
    assert all(map(is_ours, ended))
    with pytest.raises(ContainerFailedError, match="core process was ended by SIGKILL"):
        await life.service.embed(requests[0])
    assert left_behind(container.before) == set()

    printed = "".join(capfd.readouterr()).splitlines()
    assert len(log.lines) + len(printed) <= LINES, log.text
    assert log.text.count("the engine's core process was ended by SIGKILL") == 1


async def test_a_dead_engine_closes_quietly(container: Container, log: Log) -> None:
    await asyncio.gather(container.life.close(), *(engine.close() for engine in container.engines))
    assert not log.lines
