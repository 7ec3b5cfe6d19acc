"""vLLM's executor on a CPU: an engine core whose worker is another process.

A worker that a signal ends, for instance SIGILL, or SIGKILL where memory runs out, makes the core
fail with an exit status of 1, and only vLLM's log has the reason. This core ends by the same signal
instead, so that its parent can name it. vLLM loads this class by name.
"""

from __future__ import annotations

import os
from multiprocessing.process import BaseProcess

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from modal_backend.engines.vllm.process import signal_of


class SignalForwardingExecutor(MultiprocExecutor):  # type: ignore[misc]  # as in cpu_worker
    """vLLM's executor, whose process ends as its worker did."""

    @staticmethod
    def _ensure_worker_termination(worker_procs: list[BaseProcess]) -> None:
        # vLLM calls this when a worker has ended, while it loads or later, and to end workers.
        number = signal_of(worker_procs)  # before vLLM ends the others itself
        MultiprocExecutor._ensure_worker_termination(worker_procs)
        if number is not None:
            os.kill(os.getpid(), number)
