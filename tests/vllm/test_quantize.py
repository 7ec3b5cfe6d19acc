"""`kalm quantize`: exact within half a step, resumes after SIGKILL, notices a flipped bit; the
result loads where its format is known."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from filelock import FileLock
from huggingface_hub import constants
from reference import reference_vectors
from retrieval_set import PASSAGES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_gemma3, tiny_qwen2

from kalm_integrations.errors import EngineLoadError
from modal_backend import quantize
from modal_backend.engines.vllm import extension
from modal_backend.engines.vllm.config import VLLMOptions
from modal_backend.engines.vllm.engine import VLLMEngine
from modal_backend.weights import INT8, Weights, locate

SHARD = 96 * 1024
_RUN = f"""
import sys
from modal_backend import quantize
quantize._SHARD_BYTES = {SHARD}
quantize.quantize(sys.argv[1])
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_gemma3(tmp_path / "tiny-gemma")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


# --- the checkpoint


def test_weights_are_within_half_a_step_and_everything_else_is_untouched(model: Path) -> None:
    made = quantize.quantize(str(model))
    before, after = tensors_of(model), tensors_of(made.folder)
    quantized = [name for name in before if name.endswith("_proj.weight")]
    assert len(quantized) == 6 * 7
    for name in quantized:
        packed, scale = after.pop(f"{name}_packed"), after.pop(f"{name}_scale")
        integers = packed.view(torch.uint8).to(torch.int16) - 128
        assert scale.dtype == torch.bfloat16
        assert tuple(after.pop(f"{name}_shape")) == before[name].shape == integers.shape
        assert integers.abs().max() == 127
        steps = scale.float().repeat_interleave(128, 1)
        error = (integers * steps - before.pop(name).float()).abs()
        assert (error <= steps / 2 * 1.00001).all()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_it_keeps_the_name_and_revision_and_is_half_as_large(model: Path) -> None:
    original, made = locate(str(model)), quantize.quantize(str(model))
    assert (made.name, made.revision) == (original.name, original.revision)
    assert made == locate(str(model), quantization=INT8)
    linear = sum(t.nbytes for n, t in tensors_of(model).items() if n.endswith("_proj.weight"))
    assert made.size == pytest.approx(original.size - linear * (1 - 65 / 128), rel=0.05)


@pytest.mark.parametrize("architecture", ["Gemma3ForCausalLM", "Gemma3TextModel"])
def test_transformers_loads_it_with_nearly_the_same_vectors(
    tmp_path: Path, architecture: str
) -> None:
    model = tiny_gemma3(tmp_path / "m", architecture=architecture)
    made = quantize.quantize(str(model))
    vectors = reference_vectors(made.folder, PASSAGES, dtype=torch.bfloat16)
    cosines = (vectors * reference_vectors(model, PASSAGES, dtype=torch.bfloat16)).sum(1)
    assert np.median(cosines) >= 0.999


def test_the_identity_is_that_of_the_layers_and_not_of_the_attention() -> None:
    """vLLM has no kernel for int8 on CPUs: these stand for the modules that it makes on a GPU."""
    scheme = SimpleNamespace(num_bits=8, group_size=128, symmetric=True)
    layer = SimpleNamespace(quant_method=object(), scheme=scheme)
    attention = SimpleNamespace(quant_method=object(), attn_type="decoder")
    assert [extension._is_linear(module) for module in (layer, attention)] == [True, False]
    assert extension._scheme(layer) == "int8 weights, groups of 128"


async def test_int8_is_refused_where_vllm_has_no_kernel(model: Path) -> None:
    made = quantize.quantize(str(model))
    with pytest.raises(EngineLoadError, match="NVIDIA GPU"):
        await VLLMEngine.load(made, VLLMOptions(quantization="int8"))


def test_without_the_weights_the_error_names_the_command(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineLoadError, match="kalm quantize") as caught:
        locate(str(model), quantization=INT8)
    assert caught.value.permanent
    monkeypatch.setenv("MODAL_TASK_ID", "ta-1")
    with pytest.raises(EngineLoadError, match="app::quantize_model_weights"):
        locate("tencent/KaLM-Embedding-Gemma3-12B-2511", quantization=INT8)


# --- interrupted


def test_it_resumes_wherever_it_is_killed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "_SHARD_BYTES", SHARD)
    source, whole = locate(str(model)), tmp_path / "whole"
    quantize.write(source, whole)
    folder = quantize.quantized_folder(source.name, source.revision)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _RUN, str(model)]
    seen: dict[str, int] = {}
    for stop_after in (1, 3, 6, None):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout
        written = 0
        for line in process.stdout:
            written += "written and" in line
            if written == stop_after:
                time.sleep(random.uniform(0, 0.02))  # somewhere in the next file
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == (0 if stop_after is None else -signal.SIGKILL)
        for name, modified in seen.items():
            assert (folder / name).stat().st_mtime_ns == modified, "a finished file is kept"
        if stop_after is not None:
            assert not (folder / "config.json").exists(), "what is unfinished is not a model"
            files = json.loads((folder / "kalm-quantize.json").read_text())["files"]
            assert len(files) >= stop_after
            seen |= {name: (folder / name).stat().st_mtime_ns for name in files}
    assert digests(folder) == digests(whole)


def test_two_runs_do_not_write_the_same_files(model: Path) -> None:
    folder = quantize.quantize(str(model)).folder
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    with lock, pytest.raises(EngineLoadError, match=str(folder)):
        quantize.quantize(str(model))


def test_a_second_run_repairs_a_damaged_file(model: Path) -> None:
    folder = quantize.quantize(str(model)).folder
    right = digests(folder)
    (file,) = folder.glob("*.safetensors")
    flip(file, len(right[file.name]) - 1)
    assert digests(folder) != right
    quantize.quantize(str(model))
    assert digests(folder) == right


# --- read back


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("part", ["q_proj.weight_packed", "o_proj.weight_scale", "norm.weight"])
def test_a_flipped_bit_of_a_written_file_is_noticed(model: Path, part: str) -> None:
    folder = quantize.quantize(str(model)).folder
    (file,) = folder.glob("*.safetensors")
    (tensors,) = quantize._plan(model, {})
    quantize.verify(file, tensors)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    entries = json.loads(file.read_bytes()[8 : 8 + header])
    start, end = next(e["data_offsets"] for name, e in entries.items() if name.endswith(part))
    flip(file, 8 + header + random.randrange(start, end))
    with pytest.raises(EngineLoadError, match="read back"):
        quantize.verify(file, tensors)


# --- refused


def with_tensor(folder: Path, name: str, tensor: torch.Tensor) -> Path:
    (file,) = folder.glob("*.safetensors")
    save_file(load_file(file) | {name: tensor}, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("model.layers.0.mlp.experts.weight", (4, 128), "experts"),
        ("model.layers.0.mlp.extra_proj.weight", (4, 100), "100 inputs"),
    ],
)
def test_layers_of_an_unknown_kind_are_refused(
    model: Path, name: str, shape: tuple[int, int], named: str
) -> None:
    with_tensor(model, name, torch.ones(shape, dtype=torch.bfloat16))
    with pytest.raises(EngineLoadError, match=named):
        quantize.quantize(str(model))


def test_weights_that_are_not_finite_are_refused(model: Path) -> None:
    (file,) = model.glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        name = next(name for name in opened.keys() if name.endswith("v_proj.weight"))  # noqa: SIM118
        weight = opened.get_tensor(name)
    weight[0, 0] = float("nan")
    with_tensor(model, name, weight)
    with pytest.raises(EngineLoadError, match=r"v_proj.*not finite"):
        quantize.quantize(str(model))


def test_a_quantized_model_is_refused(model: Path) -> None:
    made = quantize.quantize(str(model))
    with pytest.raises(EngineLoadError, match="quantized already"):
        quantize.quantize(str(made.folder))


def test_it_agrees_with_the_librarys_own_rounding(tmp_path: Path) -> None:
    """With our scales; the library's are chosen to clip."""
    model = tiny_qwen2(tmp_path / "tiny-qwen")
    made = quantize.quantize(str(model))
    before, after = tensors_of(model), tensors_of(made.folder)
    name = next(name for name in before if name.endswith("down_proj.weight"))
    scale = after[f"{name}_scale"].float()
    arguments = quantize._scheme(8, 128).weights
    expected = fake_quantize(before[name].float(), scale, torch.zeros_like(scale), arguments)
    integers = after[f"{name}_packed"].view(torch.uint8).to(torch.int16) - 128
    assert torch.equal(integers * scale.repeat_interleave(128, 1), expected)


def test_the_pinned_commit_needs_no_original_weights(cache: Path) -> None:
    name, commit = "tencent/KaLM-Embedding-Gemma3-12B-2511", "e" * 40
    folder = quantize.quantized_folder(name, commit)
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    assert locate(name, commit, INT8) == Weights(name, commit, folder)
