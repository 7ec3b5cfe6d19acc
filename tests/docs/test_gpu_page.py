"""docs/gpu.md: its figures of each GPU are those of `modal_backend/gpus.py`."""

from __future__ import annotations

import re
from pathlib import Path

from modal_backend import gpus
from modal_backend.gpus import GPUS, QUANTIZATIONS
from modal_backend.settings import DeploySettings

PAGE = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
SECTION = PAGE.split("## Each GPU\n")[1].split("\n## ")[0]


def cell(gpu: str, quantization: gpus.Quantization) -> str:
    """What the page should show for a GPU and a type."""
    if gpus.lacks_fp8(gpu, quantization):
        return "no fp8"
    if gpus.too_small(gpu, quantization):
        return "too small"
    rate = gpus.rate(gpu, quantization)
    return f"**{rate.tokens:,.0f}**" if rate.measured else f"~{round(rate.tokens, -2):,.0f}"


def test_the_table_is_what_the_code_says() -> None:
    shown = [row.strip("| ").split(" | ") for row in re.findall(r"^\| \w.* \|$", SECTION, re.M)]
    kinds: list[gpus.Quantization] = ["none", "int8", "fp8"]
    assert shown == [
        [gpu, str(GPUS[gpu].gib), *(cell(gpu, kind) for kind in kinds)] for gpu in GPUS
    ]


def test_the_memory_that_kalm_needs_and_the_default() -> None:
    none, fp8, int8 = (f"{gpus.needed_gib(kind):.0f}" for kind in QUANTIZATIONS)
    assert f"needs {none} GiB in bf16, {fp8} in fp8 and {int8} in int8" in PAGE
    assert f"`--gpu {DeploySettings().gpu[0]}`" in PAGE
