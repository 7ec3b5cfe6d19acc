"""A worker that notes, in the process that computes, when AMX is requested and attention computed.

Stands in for `Extension` (`worker_extension_cls`): vLLM imports it before the worker is made.
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


def _noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        EVENTS.append((name, os.getpid()))
        return function(*args, **kwargs)

    return call


torch.cpu._init_amx = _noted("request", torch.cpu._init_amx)
CPUAttentionBackendImpl.forward = _noted("attention", CPUAttentionBackendImpl.forward)


class Recording(Corrupting):
    """`Extension`, and what was noted."""

    def events(self) -> list[tuple[str, int]]:
        """What happened and in which process, in order."""
        return EVENTS
