"""Starts and ends vLLM: a front-end in this process, an engine core in another one."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Final, Self

from kalm_integrations.errors import EngineLoadError
from kalm_integrations.models import profile_of
from modal_backend.engines.vllm.config import VLLMOptions, engine_arguments, kv_cache_bytes_of
from modal_backend.weights import Weights

ENVIRONMENT: Final = {
    # A forked core would inherit the sockets of this process.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    # A pool of compilers would end up in the snapshot.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    # The weights are here, checked and pinned.
    "HF_HUB_OFFLINE": "1",
    # Otherwise pinned host memory is rounded up to powers of two (a seventh of a sleeping engine)
    # and kept. With pinned_max_round_threshold_mb, torch 2.13 reuses a piece for a larger one.
    "PYTORCH_ALLOC_CONF": "pinned_max_cached_size_mb:16",
}
"""Defaults of variables that vLLM, torch and huggingface_hub read on import."""

MARK: Final = "KALM_ENGINE_MARK"
"""The variable that identifies the processes of an engine, including its workers."""

READY_TIMEOUT: Final = "VLLM_ENGINE_READY_TIMEOUT_S"

# Reads until the other end is closed: by `finish`, or by the kernel when the front-end is gone.
_GUARD_SCRIPT: Final = """
import os, signal, sys
if sys.stdin.read(1) == "":
    mark = sys.argv[1].encode()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if mark in file.read().split(b"\\0"):
                    os.kill(int(pid), signal.SIGKILL)
        except OSError:
            pass
"""


class CoreGuard:
    """A small process that kills the processes started under `marking` if this one is killed, which
    cannot end them itself. Otherwise a core would hold the GPU until somebody notices."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self._guard = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", "-c", _GUARD_SCRIPT, f"{MARK}={self._mark}"],
            stdin=subprocess.PIPE,
            start_new_session=True,  # out of reach of Ctrl-C in a terminal
        )

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Mark the processes that are started in the block."""
        os.environ[MARK] = self._mark
        try:
            yield
        finally:
            del os.environ[MARK]

    def finish(self, cores: Sequence[BaseProcess] = ()) -> None:
        """Kill the cores that still run, and end the guard."""
        for core in cores:
            if core.is_alive():
                core.kill()
            core.join()
        if self._guard.poll() is None:
            self._guard.communicate(b"x")


class StartLimit:
    """A thread that kills the engine's processes if they are not ready within
    VLLM_ENGINE_READY_TIMEOUT_S, which vLLM 0.32 ignores until a core has loaded the model."""

    def __init__(self) -> None:
        self.seconds = float(os.environ.get(READY_TIMEOUT) or math.inf)
        self.expired = False
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self._before = set(multiprocessing.active_children())
        self._thread = threading.Thread(target=self._watch, name="kalm-start-limit", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        delay = min(self.seconds, threading.TIMEOUT_MAX)
        while not self._ended.wait(delay):
            self.expired = True
            for child in set(multiprocessing.active_children()) - self._before:
                child.kill()
            delay = 0.5  # again: the front-end may not have started them yet

    def reason(self) -> str:
        """Describe the timeout and its remedy."""
        return (
            f"it was not ready within {self.seconds:g} s ({READY_TIMEOUT}): reading the weights or "
            "compiling was slow. `kalm deploy --startup-timeout` allows more on Modal; elsewhere "
            "set that variable."
        )


def set_environment() -> None:
    """Apply `ENVIRONMENT`; call it before those libraries are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def start(weights: Weights, options: VLLMOptions) -> tuple[Any, dict[str, Any]]:
    """Return the running `AsyncLLM`, for the current event loop, and its arguments. Raises an
    `EngineLoadError` if this machine does not support the options, and whatever vLLM raises."""
    if profile_of(weights.name).space.declared:
        # A repository's sentence_bert_config.json may cap the length that its card allows.
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    if options.quantization != "none" and not current_platform.is_cuda():
        raise EngineLoadError(
            f'quantization="{options.quantization}" needs an NVIDIA GPU: vLLM has no kernel for it '
            "on this machine."
        )
    can_sleep = current_platform.is_sleep_mode_available()
    arguments = engine_arguments(weights, options, can_sleep=can_sleep)
    model = AsyncEngineArgs(**arguments).create_model_config()
    if not model.is_chunked_prefill_supported:  # a step takes whole texts
        step = max(options.max_num_batched_tokens, model.max_model_len)
        arguments["max_num_batched_tokens"] = step
    package = "modal_backend.engines.vllm"
    if current_platform.is_cuda():
        arguments["worker_cls"] = f"{package}.worker.FullCudaGraphWorker"
    elif current_platform.is_cpu():
        arguments["worker_cls"] = f"{package}.cpu.AmxWorker"
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "1":  # as vLLM decides
            executor = f"{package}.cpu.SignalForwardingExecutor"
            arguments["distributed_executor_backend"] = executor
    if options.gpu_memory_utilization is None:
        size = kv_cache_bytes_of(model, arguments["max_num_batched_tokens"])
        arguments["kv_cache_memory_bytes"] = size
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments)), arguments


def signal_of(processes: Sequence[BaseProcess]) -> int | None:
    """Return the number of the signal that ended one of the processes, or None. SIGTERM does not
    count: that is how vLLM ends them."""
    ended = wait([process.sentinel for process in processes], timeout=0)
    for process in processes:
        if process.sentinel in ended:
            process.join(1)  # its files are closed, but its status may not be there yet
    statuses = [process.exitcode or 0 for process in processes]
    return next((-each for each in statuses if each < 0 and each != -signal.SIGTERM), None)


def signal_in(error: BaseException) -> int | None:
    """Return `signal_of` the core of a failed `start`. vLLM does not expose its processes then, so
    they are taken from the frame that waited for them."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        manager = getattr(frame.f_locals.get("launch"), "engine_manager", None)
        if manager is not None:
            return signal_of(manager.processes)
    return None


def core_failure(number: int | None) -> str:
    """Describe the end of a core by signal `number`, or by none, with the remedy if it is known."""
    from vllm.platforms import current_platform

    if number is None:
        return "the engine's core process died."
    message = f"the engine's core process was ended by {signal.Signals(number).name}."
    if number == signal.SIGILL and current_platform.is_cpu():
        message += (
            " This processor lacks an instruction that vLLM uses, or Linux does not grant it: use "
            "float32 (--dtype fp32), or another machine."
        )
    return message


def cores(llm: Any) -> list[BaseProcess]:
    """Return the processes of the engine core."""
    return list(llm.engine_core.resources.engine_manager.processes)


async def shut_down(llm: Any) -> None:
    """End the engine core without tracebacks in the log."""
    if llm.output_handler is not None:
        llm.output_handler.cancel()  # it would log the core's end as a failure
    await asyncio.to_thread(llm.shutdown, timeout=1)
    # Its finalizer calls this again, and fails if that is when the interpreter ends.
    llm.shutdown = lambda: None
