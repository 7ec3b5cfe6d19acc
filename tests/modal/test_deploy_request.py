"""What a deployment asks Modal for, field by field, in each configuration that is offered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from modal_emulator import Emulator, gpu_choices

from modal_backend import image
from modal_backend.engines.registry import ENGINES
from modal_backend.settings import DeploySettings

ROOT = Path(__file__).parents[2]
SERVICE, BULK = "VLLMEmbeddingSnapshot", "VLLMBulkEmbedding"
OF_THE_CLIENT = {
    "app_name",
    "class_parameter_info",
    "concurrency_limit",  # an older name of max_containers
    "definition_type",
    "function_schema",
    "function_type",
    "image_id",
    "implementation_name",
    "method_definitions_set",
    "module_name",
    "mount_client_dependencies",
    "mount_ids",
    "object_dependencies",
    "supported_input_formats",
    "supported_output_formats",
    "web_url",
    "_experimental_concurrent_cancellations",
}
"""Fields that the Modal client fills in by itself, and identifiers."""

WEIGHTS, KERNELS, JOBS = "/root/.cache/huggingface", "/root/.cache/vllm-jit", "/root/kalm-bulk"
STARTUP = DeploySettings.model_fields["startup_timeout"].default
SNAPSHOT = {
    "checkpointing_enabled": True,
    "experimental_options": {"enable_gpu_snapshot": "True"},
}


def requested(emulator: Emulator, name: str) -> dict[str, Any]:
    """A function's request without the fields of `OF_THE_CLIENT`; volumes by path, methods by
    what guards them."""
    function = emulator.function(name)
    assert not function.request.function_data.ranked_functions  # which several GPUs are sent as
    fields = MessageToDict(function.definition, preserving_proto_field_name=True)
    fields = {key: value for key, value in fields.items() if key not in OF_THE_CLIENT}
    fields["volume_mounts"] = [v["mount_path"] for v in fields.get("volume_mounts", [])]
    if methods := fields.pop("method_definitions", None):
        fields["methods"] = {
            method: about.get("webhook_config", {}).get("requires_proxy_auth", "")
            for method, about in methods.items()
        }
    return fields


def container(gpu: str, memory: int, cpu: int = 4000) -> dict[str, Any]:
    gpu_config = {"count": 1, "gpu_type": gpu} if gpu else {}
    return {"resources": {"memory_mb": memory, "milli_cpu": cpu, "gpu_config": gpu_config}}


def expected(gpu: str, memory: int, snapshot: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The requests of an app on a GPU."""
    engine = container(gpu, memory) | {
        "volume_mounts": [WEIGHTS, KERNELS],
        "startup_timeout_secs": STARTUP,
    }
    service = engine | {
        "timeout_secs": 600,
        "task_idle_timeout_secs": 300,
        "max_concurrent_inputs": 128,
    }
    return {
        SERVICE: service
        | snapshot
        | {
            "function_name": f"{SERVICE}.*",
            "is_class": True,
            "target_concurrent_inputs": 64,
            "autoscaler_settings": {
                "min_containers": 0,
                "max_containers": 1,
                "scaledown_window": 300,
            },
            "methods": {
                "embed": "",
                "embed_with_metadata": "",
                "embed_packed": "",
                "count_tokens": "",
                "describe": "",
                "http": True,
            },
        },
        BULK: engine
        | snapshot
        | {
            "function_name": f"{BULK}.*",
            "is_class": True,
            "timeout_secs": 86_400,
            "task_idle_timeout_secs": 60,
            "max_concurrent_inputs": 2,
            "target_concurrent_inputs": 1,
            "autoscaler_settings": {"max_containers": 4, "scaledown_window": 60},
            "volume_mounts": [WEIGHTS, KERNELS, JOBS],
            "retry_policy": {
                "retries": 10,
                "initial_delay_ms": 1000,
                "max_delay_ms": 60_000,
                "backoff_coefficient": 2.0,
            },
            "methods": {"embed_shard": ""},
        },
        "serve_http": service
        | {
            "function_name": "serve_http",
            "autoscaler_settings": {"max_containers": 1, "scaledown_window": 300},
            "webhook_config": {
                "type": "WEBHOOK_TYPE_WEB_SERVER",
                "async_mode": "WEBHOOK_ASYNC_MODE_AUTO",
                "web_server_port": 8000,
                "web_server_startup_timeout": float(STARTUP),
                "requires_proxy_auth": True,
            },
        },
        "download_model_weights": container("", 16 * 1024)
        | {
            "function_name": "download_model_weights",
            "timeout_secs": 7200,
            "startup_timeout_secs": 7200,  # of a function that names none
            "autoscaler_settings": {},
            "volume_mounts": [WEIGHTS, KERNELS],
        },
        "quantize_model_weights": container("", 8 * 1024)
        | {
            "function_name": "quantize_model_weights",
            "timeout_secs": 7200,
            "startup_timeout_secs": 7200,
            "autoscaler_settings": {"max_containers": 1},
            "volume_mounts": [WEIGHTS, KERNELS],
        },
        "prepare_bulk": {
            **container("", 4096, 2000),
            "function_name": "prepare_bulk",
            "timeout_secs": 86_400,
            "startup_timeout_secs": 86_400,
            "retry_policy": {
                "retries": 2,
                "initial_delay_ms": 1000,
                "max_delay_ms": 60_000,
                "backoff_coefficient": 1.0,
            },
            "autoscaler_settings": {},
            "volume_mounts": [JOBS],
        },
    }


def embedded() -> dict[str, dict[str, Any]]:
    """The requests of an app with the embedded engine: nothing of a GPU."""
    snapshot = {"checkpointing_enabled": True}
    made = expected("", 2048, snapshot)
    functions = {name: made[name] for name in (SERVICE, BULK, "prepare_bulk")}
    for name in (SERVICE, BULK):
        functions[name] |= container("", 2048, 1000)
        functions[name]["volume_mounts"] = [JOBS] if name == BULK else []
    return functions


CONFIGURATIONS: dict[str, tuple[dict[str, str], dict[str, dict[str, Any]]]] = {
    "default": ({}, expected("A100-40GB", 40 * 1024, SNAPSHOT)),
    "fp8": (
        {"QUANTIZATION": "fp8", "GPU": "L40S"},
        expected("L40S", 28 * 1024, SNAPSHOT),
    ),
    "embedded": ({"ENGINE": "embedded"}, embedded()),
}


@pytest.fixture(scope="module")
def emulator(new_emulator: Any) -> Emulator:
    made: Emulator = new_emulator()
    return made


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_field_of_the_request(emulator: Emulator, name: str) -> None:
    settings, functions = CONFIGURATIONS[name]
    variables = {f"KALM_DEPLOY_{key}": value for key, value in settings.items()}
    before = len(emulator.created)
    emulator.deploy("modal_backend.app", cwd=ROOT, env={**variables, "KALM_DEPLOY_APP_NAME": name})
    assert len(emulator.created) - before == len(functions)
    for function, wanted in functions.items():
        assert requested(emulator, f"{name}/{function}") == wanted, function
    built = emulator.image(f"{name}/{SERVICE}")
    assert built.python_version == "3.12"
    own = {f"KALM_DEPLOY_{key}": value for key, value in settings.items()}
    assert own.items() <= built.env.items()
    (install,) = [words for words in built.installs if "--compile-bytecode" in words]
    if name == "embedded":
        assert set(built.packages) >= {*image.SERVER, *image.BULK, *ENGINES["embedded"].packages}
    else:
        assert "FROM nvidia/cuda:13.0.2-devel-ubuntu22.04" in built.commands
        assert {"--no-deps", "--requirements"} <= set(install)
        assert image.LOCK.read_bytes() in built.context_files.values()
        assert built.env["HF_XET_HIGH_PERFORMANCE"] == "1"


def test_several_gpu_types_are_sent_in_order(emulator: Emulator) -> None:
    variables = {"KALM_DEPLOY_GPU": "H100!,H200", "KALM_DEPLOY_APP_NAME": "several"}
    emulator.deploy("modal_backend.app", cwd=ROOT, env=variables)
    for function in (SERVICE, BULK, "serve_http"):
        assert gpu_choices(emulator.function(f"several/{function}").request) == ["H100!", "H200"]
