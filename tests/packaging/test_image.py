"""The packages of the containers' images: they resolve for Python 3.12, agree with what the tests
run, and are enough for everything that can be imported without a GPU.

Needs a package index. One that lacks a pinned version fails the test, as it would fail a
deployment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from lock_image import INPUTS, OTHERWISE, ROOT, as_tested, pins, resolve

from modal_backend import image
from modal_backend.engines.registry import ENGINES

LOCKED = pins(image.LOCK.read_text().splitlines())


def test_the_lock_has_the_packages_of_the_image_and_of_the_tests() -> None:
    assert pins(INPUTS).items() <= LOCKED.items()
    both = as_tested().keys() & LOCKED.keys()
    assert {"transformers", "tokenizers", "safetensors", "numpy"} <= both
    assert {name: LOCKED[name] for name in both} == {name: as_tested()[name] for name in both}
    assert OTHERWISE.keys() & LOCKED.keys() == {"torch", "apache-tvm-ffi"}


def test_the_lock_is_complete_and_resolves_for_the_image() -> None:
    lines = image.LOCK.read_text().splitlines()
    locked = [line for line in lines if not line.startswith("#")]
    assert resolve(INPUTS, locked) == locked


def test_the_embedded_image_resolves() -> None:
    wanted = (*image.SERVER, *image.BULK, *ENGINES["embedded"].packages)
    assert pins(wanted).items() <= pins(resolve(wanted, ())).items()


def test_a_package_that_does_not_exist_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"numpy.*0\.0\.0\.1"):
        resolve(["numpy==0.0.0.1"], ())


def test_the_base_image_has_the_cuda_of_torch() -> None:
    major, minor, _ = image.CUDA.split(".")
    toolkit = {name: LOCKED[f"nvidia-cuda-{name}"] for name in ("runtime", "nvrtc", "nvcc")}
    assert {version.rsplit(".", 1)[0] for version in toolkit.values()} == {f"{major}.{minor}"}


@pytest.mark.parametrize("engine", ["vllm", "embedded"])
def test_modules_without_gpu_import_with_the_packages_of_the_image(
    engine: str, tmp_path: Path
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    venv.create(tmp_path / "venv", symlinks=True)
    packages = [*image.SERVER, *image.BULK, "modal>=1.6.4,<1.7"]  # Modal mounts its client
    modules = ["modal_backend.app", "modal_backend.http.app", "modal_backend.bulk.worker"]
    modules += ["modal_backend.bulk.prepare", "modal_backend.weights"]
    if engine == "vllm":
        names = ("transformers", "tokenizers")
        packages += [*image.HUB, *(f"{name}=={LOCKED[name]}" for name in names)]
        modules += [*names, "huggingface_hub", "hf_xet", "modal_backend.engines.vllm.config"]
    else:
        packages += ENGINES["embedded"].packages
        modules += ["modal_backend.engines.embedded"]
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python]
    constraints = ["--constraint", image.LOCK] if engine == "vllm" else []
    _run([*uv, *constraints, *packages])
    code = "\n".join(f"import {name}" for name in modules)
    _run([python, "-c", code], PYTHONPATH=str(ROOT), KALM_DEPLOY_ENGINE=engine, HOME=str(tmp_path))


def _run(command: list[str | Path], **variables: str) -> None:
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300, env=_outside(variables)
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _outside(variables: dict[str, str]) -> dict[str, str]:
    theirs = {k: v for k, v in os.environ.items() if not k.startswith(("KALM_", "PYTHON"))}
    return theirs | variables
