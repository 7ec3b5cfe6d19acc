"""The container's image. Packages that decide vectors are pinned to the tested versions."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import modal

from modal_backend import compile_cache
from modal_backend.settings import DeploySettings

PYTHON: Final = "3.12"
CUDA: Final = "13.0.2"
"""CUDA version of the pinned torch, and of the base image, whose nvcc compiles kernels."""
LOCK: Final = Path(__file__).with_name("image_requirements.txt")
"""All packages of the image with vLLM: those below and their dependencies, at tested versions.
`make image-lock` writes it."""
SERVER: Final = (
    "numpy==2.3.5",
    "orjson==3.13.0",
    "prometheus-client==0.26.0",
    "pydantic==2.14.3",
    "safetensors==0.8.0",
    "starlette==1.10.0",
    "xxhash==4.1.0",
)
BULK: Final = ("pyarrow==26.0.1",)
VLLM: Final = (
    "vllm==0.32.0",
    "torch==2.13.0",
    "triton==3.7.1",
    "flashinfer-python==0.7.0.post1",
    "transformers==5.19.0",
    "tokenizers==0.23.3",
)
HUB: Final = ("huggingface-hub==2.4.0", "hf-xet==1.8.0", "hf_transfer==0.1.9")
SOURCES: Final = ("kalm_integrations", "modal_backend")

HF_VOLUME: Final = "/root/.cache/huggingface"  # the default of Hugging Face's libraries
JIT_VOLUME: Final = f"/root/{compile_cache.VOLUME}"


def image_of(settings: DeploySettings) -> modal.Image:
    """Return the image for `settings.engine`, with the sources and settings of this package."""
    if not settings.on_gpu:
        packages = (*SERVER, *BULK, *settings.engine_type.packages)
        image = modal.Image.debian_slim(python_version=PYTHON).uv_pip_install(*packages)
    else:
        image = (
            # devel: vLLM compiles kernels for the card that it finds.
            modal.Image.from_registry(f"nvidia/cuda:{CUDA}-devel-ubuntu22.04", add_python=PYTHON)
            .entrypoint([])
            # Modal compiles what uv installs to bytecode.
            .uv_pip_install(requirements=[str(LOCK)], extra_options="--no-deps")
            .env(
                {
                    "HF_XET_HIGH_PERFORMANCE": "1",
                    "HF_HUB_ENABLE_HF_TRANSFER": "1",  # for older versions of huggingface_hub
                    "VLLM_NO_USAGE_STATS": "1",
                }
            )
        )
    # Sources last, so that a change in them rebuilds nothing.
    return image.env(settings.as_variables()).add_local_python_source(*SOURCES)
