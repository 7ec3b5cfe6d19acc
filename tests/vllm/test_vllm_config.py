"""vLLM's arguments, and the check that the loaded model follows them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running import SMALL, children, left_behind
from tiny_models import tiny_gemma3

from kalm_integrations import models
from kalm_integrations.errors import EngineLoadError
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import profile_of
from modal_backend.engines.vllm.config import VLLMOptions, check, engine_arguments, graph_sizes
from modal_backend.engines.vllm.engine import VLLMEngine
from modal_backend.weights import Weights, locate

pytestmark = pytest.mark.asyncio(loop_scope="session")

FP32 = VLLMOptions(**SMALL)
KALM = Weights(models.KALM.space.model, "0" * 40, Path("/models/kalm"))


# --- arguments


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> Weights:
    """A model whose space we know, with mean pooling."""
    undeclared = SpaceIdentity.undeclared("someone/mean")
    space = replace(undeclared, revision="1" * 40, pooling="mean", attention="bidirectional")
    profile = replace(models.KALM, space=space)
    monkeypatch.setitem(models._KNOWN, space.model, profile)
    return Weights(space.model, space.revision, Path("/models/mean"))


async def test_pooling_and_dtype_of_a_known_model_are_requested(declared: Weights) -> None:
    arguments = engine_arguments(declared, VLLMOptions(), can_sleep=True)
    assert arguments["pooler_config"].seq_pooling_type == "MEAN"
    assert arguments["pooler_config"].use_activation is True
    assert arguments["dtype"] == "bfloat16"
    assert engine_arguments(declared, FP32, can_sleep=True)["dtype"] == "float32"


async def test_only_normalization_of_an_unknown_model_is_requested(gemma: Path) -> None:
    arguments = engine_arguments(locate(str(gemma)), VLLMOptions(), can_sleep=False)
    assert arguments["pooler_config"].seq_pooling_type is None
    assert arguments["pooler_config"].use_activation is True
    assert arguments["dtype"] == "auto"
    assert arguments["trust_remote_code"] is False
    assert "max_model_len" not in arguments
    assert "quantization" not in arguments


@pytest.mark.parametrize(
    ("mode", "attention", "expected", "splits"),
    [
        ("PIECEWISE", "ALWAYS", "FULL", 1),  # FlashAttention 3, on a Hopper card
        ("PIECEWISE", "UNIFORM_BATCH", "PIECEWISE", 32),  # FlashAttention 2
        ("NONE", "ALWAYS", "NONE", 32),  # eager
    ],
)
async def test_full_cuda_graphs_are_used_where_attention_supports_them(
    mode: str, attention: str, expected: str, splits: int
) -> None:
    from vllm.config import AttentionConfig, CompilationConfig, CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport

    from modal_backend.engines.vllm.worker import use_full_graphs

    compilation = CompilationConfig(cudagraph_mode=CUDAGraphMode[mode])
    config = SimpleNamespace(compilation_config=compilation, attention_config=AttentionConfig())
    use_full_graphs(config, AttentionCGSupport[attention])
    assert compilation.cudagraph_mode == CUDAGraphMode[expected]
    assert config.attention_config.flash_attn_max_num_splits_for_cuda_graph == splits


@pytest.mark.parametrize("step", [7, 8, 1000, 1024, 2048, 16_384, 20_000])
async def test_the_largest_cuda_graph_is_a_full_step(step: int) -> None:
    sizes = graph_sizes(step)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == step


async def test_options_become_arguments(gemma: Path) -> None:
    options = VLLMOptions(
        quantization="fp8",
        max_model_len=512,
        max_num_batched_tokens=1024,
        max_num_seqs=7,
        enforce_eager=True,
        gpu_memory_utilization=0.5,
    )
    arguments = engine_arguments(locate(str(gemma)), options, can_sleep=True)
    assert arguments["quantization"] == "fp8_per_tensor"
    assert arguments["max_model_len"] == 512
    assert arguments["max_num_batched_tokens"] == 1024
    assert arguments["max_num_seqs"] == 7
    assert arguments["enforce_eager"] is True
    assert arguments["gpu_memory_utilization"] == 0.5
    assert arguments["enable_sleep_mode"] is True
    assert arguments["scheduling_policy"] == "priority"


@pytest.mark.parametrize(("memory", "strategy"), [(10**12, "prefetch"), (10**4, None)])
async def test_weights_are_prefetched_if_they_fit_into_memory(
    gemma: Path, monkeypatch: pytest.MonkeyPatch, memory: int, strategy: str | None
) -> None:
    monkeypatch.setattr("modal_backend.engines.vllm.config.memory_bytes", lambda: memory)
    arguments = engine_arguments(locate(str(gemma)), VLLMOptions(), can_sleep=False)
    assert arguments["safetensors_load_strategy"] == strategy


# --- the loaded model


async def test_loading_prefetches_weights_without_autotuning(engine: VLLMEngine) -> None:
    config = engine._llm.vllm_config
    assert config.load_config.safetensors_load_strategy == "prefetch"
    assert config.kernel_config.enable_flashinfer_autotune is False


async def test_identity_of_an_unknown_model_is_read_from_its_folder(
    engine: VLLMEngine, gemma: Path
) -> None:
    assert engine.identity == SpaceIdentity(
        model="tiny-gemma",
        revision=locate(str(gemma)).revision,
        pooling="last",
        normalized=True,
        attention="causal",
        quantization="fp32",
        profile=1,
    )
    assert engine.max_tokens == 2048
    assert engine.query_template == "{text}"


async def test_a_known_model_ignores_the_settings_in_its_repository(
    known: VLLMEngine,
) -> None:
    profile = profile_of("someone/known-gemma")
    assert known.identity == profile.space  # the commit is that of the cache
    assert known.dimensions == profile.dimensions
    assert known.max_tokens == 2048
    assert known.query_template == "Query: {text}"
    assert known._llm.model_config.encoder_config["max_seq_length"] == 64  # vLLM had read them


# --- the check


def differing(engine: VLLMEngine, options: VLLMOptions = FP32, **identity: Any) -> str:
    """The refusal of an engine with this identity that was requested with these options."""
    arguments = engine_arguments(locate(engine._llm.model_config.model), options, can_sleep=False)
    with pytest.raises(EngineLoadError) as caught:
        check(engine._llm.vllm_config, replace(engine.identity, **identity), options, arguments)
    return str(caught.value)


async def test_a_model_loaded_as_requested_passes(engine: VLLMEngine, known: VLLMEngine) -> None:
    for loaded, options in (
        (engine, FP32),
        (engine, replace(FP32, dtype="auto")),
        (engine, replace(FP32, max_model_len=2048)),
        (known, replace(FP32, max_model_len=2048)),
    ):
        arguments = engine_arguments(
            locate(loaded._llm.model_config.model), options, can_sleep=False
        )
        check(loaded._llm.vllm_config, loaded.identity, options, arguments)


async def test_every_difference_from_a_known_model_is_named(known: VLLMEngine) -> None:
    assert "pooling: 'last' != 'mean'" in differing(known, pooling="mean")
    assert "attention: 'causal' != 'bidirectional'" in differing(known, attention="bidirectional")
    assert "quantization: 'fp32' != 'bf16'" in differing(known, quantization="bf16")
    assert "normalized: True != False" in differing(known, normalized=False)
    both = differing(known, pooling="mean", attention="bidirectional")
    assert "pooling" in both
    assert "attention" in both


async def test_every_difference_from_the_request_is_named(engine: VLLMEngine) -> None:
    assert "dtype: 'bf16' != 'fp32'" in differing(engine, replace(FP32, dtype="bf16"))
    assert "max_model_len: 512 != 2048" in differing(engine, replace(FP32, max_model_len=512))
    assert "quantization: 'fp8' != 'fp32'" in differing(engine, replace(FP32, quantization="fp8"))
    more = replace(FP32, max_num_batched_tokens=512)
    assert "max_num_batched_tokens: 512 != 256" in differing(engine, more)
    assert "normalized: True != False" in differing(engine, normalized=False)


async def test_dimensions_that_differ_from_the_profile_are_refused(
    known: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = known.identity.model
    monkeypatch.setitem(models._KNOWN, name, replace(profile_of(name), dimensions=(3840, 128)))
    assert "dimensions: 3840 != 128" in differing(known)


async def test_causal_attention_of_a_bidirectional_model_is_refused(tmp_path: Path) -> None:
    # vLLM heeds use_bidirectional_attention under Gemma3TextModel only.
    folder = tiny_gemma3(tmp_path, bidirectional=True)
    before = children()
    with pytest.raises(EngineLoadError, match=r"config\.json says bidirectional.*causal"):
        await VLLMEngine.load(locate(str(folder)), FP32)
    assert not left_behind(before)


# --- failing loads


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["NoSuchModel"]
    config["model_type"] = "no_such_type"
    (folder / "config.json").write_text(json.dumps(config))


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_config, "config.json"),
        (unknown_architecture, "no_such_type"),
        (cut_weights, ""),  # only the core notices; its message is in the log
    ],
)
async def test_a_failed_load_raises_one_error_and_leaves_no_process(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tiny_gemma3(tmp_path)
    damage(folder)
    before = children()
    tasks = asyncio.all_tasks()
    started = time.monotonic()
    with pytest.raises(EngineLoadError) as caught:
        await VLLMEngine.load(locate(str(folder)), FP32)
    assert time.monotonic() - started < 500  # vLLM's own patience with a core is 600 s
    assert str(folder) in str(caught.value)
    assert message in str(caught.value)
    assert not left_behind(before)
    assert asyncio.all_tasks() == tasks
