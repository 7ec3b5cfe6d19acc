"""The command line of a stock `vllm serve` with KaLM."""

from __future__ import annotations

import json
from typing import Final

from kalm_integrations.profiles import KALM
from modal_backend.settings import DeploySettings

STOCK_PORT: Final = 8000


def stock_command(settings: DeploySettings) -> list[str]:
    """Pooling and normalization stated, since a repository's files may say otherwise."""
    command = ["vllm", "serve", KALM.space.model, "--host", "0.0.0.0", "--port", str(STOCK_PORT)]  # noqa: S104
    command += ["--runner", "pooling", "--convert", "embed"]
    command += ["--max-model-len", str(settings.max_model_len)]
    command += ["--pooler-config", json.dumps({"seq_pooling_type": "LAST", "use_activation": True})]
    command += ["--hf-overrides", json.dumps({"matryoshka_dimensions": list(KALM.dimensions)})]
    return command + (["--quantization", "fp8"] if settings.quantization == "fp8" else [])
