"""The command line of `vllm serve`, read by vLLM's own parser."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from kalm_integrations.models import KALM
from modal_backend.settings import DeploySettings
from modal_backend.vllm_serve import vllm_serve_command


def parsed(**settings: Any) -> Any:
    command = vllm_serve_command(DeploySettings(**settings))
    assert command[:2] == ["vllm", "serve"]
    return make_arg_parser(FlexibleArgumentParser()).parse_args(command[2:])


def test_everything_that_changes_kalms_vectors_is_stated() -> None:
    arguments = parsed()
    assert arguments.model_tag == KALM.space.model
    assert arguments.revision == KALM.space.revision
    assert (arguments.runner, arguments.convert) == ("pooling", "embed")
    assert arguments.pooler_config.seq_pooling_type == "LAST"
    assert arguments.pooler_config.use_activation is True
    assert arguments.max_model_len == KALM.max_tokens
    assert arguments.hf_overrides == {"matryoshka_dimensions": list(KALM.dimensions)}


@pytest.mark.parametrize(
    ("setting", "value", "argument"),
    [
        ("max_model_len", 1024, 1024),
        ("enforce_eager", True, True),
        ("gpu_memory_utilization", 0.8, 0.8),
        ("revision", "a" * 40, "a" * 40),
    ],
)
def test_settings_become_arguments(setting: str, value: Any, argument: Any) -> None:
    assert getattr(parsed(**{setting: value}), setting) == argument


def test_weights_are_prefetched_without_autotuning() -> None:
    assert parsed().safetensors_load_strategy == "prefetch"
    assert parsed().kernel_config.enable_flashinfer_autotune is False


def test_fp8_is_requested_by_vllms_name() -> None:
    assert parsed(quantization="fp8", gpu="H100").quantization == "fp8_per_tensor"


def test_the_files_of_another_model_decide() -> None:
    arguments = parsed(model="someone/model")
    assert arguments.revision == "main"
    assert arguments.pooler_config.seq_pooling_type is None
    assert arguments.max_model_len is None
