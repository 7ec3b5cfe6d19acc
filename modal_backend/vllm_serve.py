"""The command line of `vllm serve`, for the function `serve_http` of the app."""

from __future__ import annotations

import json
from typing import Any, Final

from kalm_integrations.models import profile_of
from modal_backend.engines.vllm.config import DTYPE_ARGUMENT, FP8_METHOD, KERNELS
from modal_backend.settings import DeploySettings
from modal_backend.weights import pinned_revision

PORT: Final = 8000


def vllm_serve_command(settings: DeploySettings) -> list[str]:
    """Return the command; it states all that changes vectors, whatever the files of a repository
    say."""
    profile = profile_of(settings.model)
    length = settings.max_model_len
    pooler: dict[str, Any] = {"use_activation": True}
    command = ["vllm", "serve", settings.model, "--host", "0.0.0.0", "--port", str(PORT)]  # noqa: S104  # nosec B104
    command += ["--revision", settings.revision or pinned_revision(settings.model)]
    command += ["--runner", "pooling", "--convert", "embed"]
    if profile.space.declared:
        pooler["seq_pooling_type"] = profile.space.pooling.upper()
        length = length or profile.max_tokens
        overrides = {"matryoshka_dimensions": list(profile.dimensions)}
        command += ["--hf-overrides", json.dumps(overrides)]
    command += ["--dtype", DTYPE_ARGUMENT[profile.dtype]] if profile.dtype else []
    command += ["--pooler-config", json.dumps(pooler)]
    command += ["--kernel-config", json.dumps(KERNELS)]
    command += ["--safetensors-load-strategy", "prefetch"]  # they fit into the container's memory
    command += ["--max-model-len", str(length)] if length else []
    command += ["--enforce-eager"] if settings.enforce_eager else []
    if settings.gpu_memory_utilization is not None:
        command += ["--gpu-memory-utilization", str(settings.gpu_memory_utilization)]
    return command + (["--quantization", FP8_METHOD] if settings.quantization == "fp8" else [])
