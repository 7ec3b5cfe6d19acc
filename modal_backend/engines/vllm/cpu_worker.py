"""vLLM's worker on a CPU, which asks Linux for AMX before anything is computed.

Linux grants the AMX registers of a process only on request. vLLM's attention in bfloat16 uses them
on every processor that has them, and leaves the request to oneDNN, which a small model never
reaches: without it the process is ended by SIGILL in its first forward pass. vLLM loads this class
by name, in the process that computes.
"""

from __future__ import annotations

import logging

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

log = logging.getLogger(__name__)


class AmxWorker(CPUWorker):  # type: ignore[misc]  # vLLM is not installed everywhere
    """vLLM's worker, in a process that may use AMX."""

    def init_device(self) -> None:
        """See vLLM's."""
        request_amx()
        super().init_device()


def request_amx() -> None:
    """Request AMX for this process, all its threads included. Does nothing on a processor without.

    A refusal is logged: the process may then be ended by SIGILL in bfloat16.
    """
    request = getattr(torch.cpu, "_init_amx", None)
    if request is not None and not request() and torch.cpu._is_amx_tile_supported():
        log.warning("this processor has AMX, and Linux does not let this process use it")
