"""A worker that records when AMX is requested and attention is computed.

Replaces `WorkerExtension` (`worker_extension_cls`): vLLM imports it before it creates the worker.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from corrupting import Corrupting
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

EVENTS: list[tuple[str, int]] = []


def _recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        EVENTS.append((name, os.getpid()))
        return function(*args, **kwargs)

    return call


torch.cpu._init_amx = _recorded("request", torch.cpu._init_amx)
CPUAttentionBackendImpl.forward = _recorded("attention", CPUAttentionBackendImpl.forward)


class Recording(Corrupting):
    """`WorkerExtension` with the recorded events."""

    def events(self) -> list[tuple[str, int]]:
        """What happened and in which process, in order."""
        return EVENTS
