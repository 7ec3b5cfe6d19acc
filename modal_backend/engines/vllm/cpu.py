"""vLLM's worker and executor on a CPU. vLLM loads both classes by name."""

from __future__ import annotations

import logging
import os
from multiprocessing.process import BaseProcess

import torch
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.worker.cpu_worker import CPUWorker

from modal_backend.engines.vllm.process import signal_of

log = logging.getLogger(__name__)


class AmxWorker(CPUWorker):  # type: ignore[misc]  # vLLM is not installed everywhere
    """Requests AMX before anything is computed.

    Linux grants the AMX registers of a process only on request. vLLM's attention in bfloat16 uses
    them on every processor that has them, but leaves the request to oneDNN, which a small model
    never reaches: SIGILL then ends the process in its first forward pass.
    """

    def init_device(self) -> None:
        request_amx()
        super().init_device()


def request_amx() -> None:
    """Request AMX for all threads of this process, if the processor has it. A refusal is logged."""
    request = getattr(torch.cpu, "_init_amx", None)
    if request is not None and not request() and torch.cpu._is_amx_tile_supported():
        log.warning("this processor has AMX, but Linux does not let this process use it")


class SignalForwardingExecutor(MultiprocExecutor):  # type: ignore[misc]
    """Ends its process, the engine core, by the signal that ended its worker (SIGILL, or SIGKILL
    if memory runs out). vLLM's ends with status 1, and only its log has the reason."""

    @staticmethod
    def _ensure_worker_termination(worker_procs: list[BaseProcess]) -> None:
        # vLLM calls this when a worker has ended, and to end workers.
        number = signal_of(worker_procs)  # before vLLM ends the others itself
        MultiprocExecutor._ensure_worker_termination(worker_procs)
        if number is not None:
            os.kill(os.getpid(), number)
