"""Starting vLLM, and ending it: a front-end in this process, an engine core in another one.

No core outlives its front-end. Killed outright, that cannot end it, and the core would hold the GPU
until somebody finds it; hence `CoreGuard`.
"""

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
from modal_backend.engines.vllm.config import VLLMOptions, arguments, kv_cache_bytes
from modal_backend.weights import Weights

ENVIRONMENT: Final = {
    # A forked core would inherit the sockets of this process.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    # A pool of compilers would end up in the snapshot.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    # The weights are here, checked and pinned; nothing is asked for elsewhere.
    "HF_HUB_OFFLINE": "1",
    # A larger piece of pinned host memory is neither rounded up to a power of two, a seventh of a
    # sleeping engine, nor kept for another use. (Do not set pinned_max_round_threshold_mb instead:
    # in torch 2.13 such a piece is then used again for a larger one.)
    "PYTORCH_ALLOC_CONF": "pinned_max_cached_size_mb:16",
}
"""What vLLM, torch and the hub's libraries read; what is set already stays."""

MARK: Final = "KALM_ENGINE_MARK"
"""The variable by which the processes of an engine are known, its workers' too."""

READY_TIMEOUT: Final = "VLLM_ENGINE_READY_TIMEOUT_S"
_AGAIN: Final = 0.5

_CPU_EXECUTOR: Final = "modal_backend.engines.vllm.cpu_executor.SignalForwardingExecutor"

# Reads until the other end is closed: by `finish`, or by the kernel when the front-end is gone.
_SCRIPT: Final = """
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
    """A small process that kills what was started under `marking` when this one ends without
    `finish`, while it loads or later."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self._guard = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", "-c", _SCRIPT, f"{MARK}={self._mark}"],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is not for it
        )

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Mark the processes that are started meanwhile."""
        os.environ[MARK] = self._mark
        try:
            yield
        finally:
            del os.environ[MARK]

    def finish(self, cores: Sequence[BaseProcess] = ()) -> None:
        """Kill what is still there of the cores, and end the guard."""
        for core in cores:
            if core.is_alive():
                core.kill()
            core.join()
        if self._guard.poll() is None:
            self._guard.communicate(b"x")


def set_environment() -> None:
    """To be called before any of those libraries is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def start(weights: Weights, options: VLLMOptions) -> tuple[Any, dict[str, Any]]:
    """The running `AsyncLLM`, and what it was given. Call it on the event loop that it is to use.

    Raises:
        EngineLoadError: This machine cannot do what is asked.
        Exception: Whatever vLLM raises.
    """
    if profile_of(weights.name).space.declared:
        # A repository's sentence_bert_config.json may cap the length that its card allows.
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    if options.quantization == "fp8" and not current_platform.is_cuda():
        raise EngineLoadError('quantization="fp8" needs an NVIDIA GPU that computes in it.')
    asked = arguments(weights, options, can_sleep=current_platform.is_sleep_mode_available())
    model = AsyncEngineArgs(**asked).create_model_config()
    if not model.is_chunked_prefill_supported:  # a step takes whole texts
        asked["max_num_batched_tokens"] = max(options.max_num_batched_tokens, model.max_model_len)
    if current_platform.is_cuda():
        asked["worker_cls"] = "modal_backend.engines.vllm.worker.WholeGraphs"
    elif current_platform.is_cpu():
        asked["worker_cls"] = "modal_backend.engines.vllm.cpu_worker.AmxWorker"
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "1":  # as vLLM decides
            asked["distributed_executor_backend"] = _CPU_EXECUTOR
    if options.gpu_memory_utilization is None:
        asked["kv_cache_memory_bytes"] = kv_cache_bytes(model, asked["max_num_batched_tokens"])
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**asked)), asked


def signal_of(processes: Sequence[BaseProcess]) -> int | None:
    """The number of the signal that ended one of the processes; None if none did, or SIGTERM,
    which is how vLLM ends them."""
    ended = wait([process.sentinel for process in processes], timeout=0)
    for process in processes:
        if process.sentinel in ended:
            process.join(1)  # its files were closed; its status may not be there yet
    statuses = [process.exitcode or 0 for process in processes]
    return next((-each for each in statuses if each < 0 and each != -signal.SIGTERM), None)


def signal_in(error: BaseException) -> int | None:
    """`signal_of` the core that `start` could not start.

    Args:
        error: What it raised. vLLM does not hand its processes out: they are looked for in the
            function that waited for them. (Its message has no status of a core that has only just
            ended.)
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        manager = getattr(frame.f_locals.get("launch"), "engine_manager", None)
        if manager is not None:
            return signal_of(manager.processes)
    return None


class StartLimit:
    """Kills the engine's processes when they are not ready within VLLM_ENGINE_READY_TIMEOUT_S,
    where that is set.

    vLLM 0.32 heeds that variable only after a core has loaded the model; until then it waits
    without end. `start` blocks the event loop, so the time is watched on a thread.
    """

    def __init__(self) -> None:
        self.seconds = float(os.environ.get(READY_TIMEOUT) or math.inf)
        self.expired = False
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self._before = set(multiprocessing.active_children())
        self._thread = threading.Thread(target=self._watch, name="kalm-start-limit", daemon=True)
        if self.seconds < math.inf:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        limit = self.seconds
        while not self._ended.wait(limit):
            self.expired = True
            for child in set(multiprocessing.active_children()) - self._before:
                child.kill()
            limit = _AGAIN  # the front-end may not have started them yet

    def reason(self) -> str:
        """A sentence that says what happened, and how to allow more."""
        return (
            f"it was not ready within {self.seconds:g} s ({READY_TIMEOUT}): reading the weights or "
            "compiling was slow. `kalm deploy --startup-timeout` allows more on Modal; elsewhere "
            "set that variable."
        )


def core_failure(number: int | None) -> str:
    """A sentence that says how a core process ended, and what to do where that is known.

    Args:
        number: Of the signal that ended it; None if none did.
    """
    from vllm.platforms import current_platform

    if number is None:
        return "the engine's core process died."
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal
        name = f"signal {number}"
    ended = f"the engine's core process was ended by {name}."
    if number == signal.SIGILL and current_platform.is_cpu():
        ended += (
            " This processor lacks an instruction that vLLM uses, or Linux does not grant it: use "
            "float32 (--dtype fp32), or another machine."
        )
    return ended


def cores(llm: Any) -> list[BaseProcess]:
    """The processes of its engine core."""
    return list(llm.engine_core.resources.engine_manager.processes)


async def shut_down(llm: Any) -> None:
    """End the engine core, as quietly as vLLM can."""
    if llm.output_handler is not None:
        llm.output_handler.cancel()  # it would log the core's end as a failure
    await asyncio.to_thread(llm.shutdown, timeout=1)
    # Its finalizer shuts down once more, and fails where that is when the interpreter ends.
    llm.shutdown = _nothing


def _nothing() -> None:
    pass
