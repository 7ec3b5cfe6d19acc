"""docs/gpu.md: its table of GPUs is what `modal_backend/gpus.py` calculates and measured."""

from __future__ import annotations

import re
from pathlib import Path

from modal_backend import gpus
from modal_backend.gpus import GPUS, QUANTIZATIONS
from modal_backend.settings import DeploySettings

PAGE = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
SECTION = PAGE.split("## Each GPU\n")[1].split("\n## ")[0]
HOPPER = ("H100", "H200")


def row(gpu: str, quantization: gpus.Quantization) -> str:
    """The row that the page should have."""
    kind = "bf16" if quantization == "none" else quantization
    memory = f"{GPUS[gpu].gib}, {gpus.needed_gib(quantization):.0f}"
    if gpus.lacks_fp8(gpu, quantization):
        return f"| {gpu} | {kind} | – | {memory} | – | – | refused: does not compute in fp8 |"
    if gpus.too_small(gpu, quantization):
        return f"| {gpu} | {kind} | – | {memory} | – | – | refused: too little memory |"
    default = DeploySettings()
    options = f"`--gpu {gpu}{'' if quantization == 'none' else f' --quantization {quantization}'}`"
    if ((gpu,), quantization) == (default.gpu, default.quantization):
        options += " (default)"
    attention = (
        "3, one graph" if gpu in HOPPER else "vLLM chooses" if gpu == "B200" else "2, pieces"
    )
    rate = gpus.rate(gpu, quantization)
    tokens = f"{rate.tokens:,.0f}" if rate.measured else f"~{round(rate.tokens, -2):,.0f}"
    status = "**measured**" if rate.measured else "calculated; never run"
    return f"| {gpu} | {kind} | {options} | {memory} | {attention} | {tokens} | {status} |"


def test_the_table_is_what_the_code_says() -> None:
    shown = re.findall(r"^\| .* \| (?:bf16|fp8|int8) \| .*$", SECTION, re.MULTILINE)
    assert shown == [row(gpu, quantization) for gpu in GPUS for quantization in QUANTIZATIONS]
