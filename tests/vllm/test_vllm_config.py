"""What vLLM made of a model is what it was told to make of it, or nothing is served."""

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
from modal_backend.engines.vllm.config import VLLMOptions, arguments, check, graph_sizes
from modal_backend.engines.vllm.engine import VLLMEngine
from modal_backend.weights import Weights, locate

pytestmark = pytest.mark.asyncio(loop_scope="session")

FP32 = VLLMOptions(**SMALL)
KALM = Weights(models.KALM.space.model, "0" * 40, Path("/models/kalm"))


# --- what is asked for


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> Weights:
    """A model whose space we know, with mean pooling."""
    undeclared = SpaceIdentity.undeclared("someone/mean")
    space = replace(undeclared, revision="1" * 40, pooling="mean", attention="bidirectional")
    profile = replace(models.KALM, space=space)
    monkeypatch.setitem(models._KNOWN, space.model, profile)
    return Weights(space.model, space.revision, Path("/models/mean"))


async def test_of_a_known_model_pooling_and_type_are_stated(declared: Weights) -> None:
    asked = arguments(declared, VLLMOptions(), can_sleep=True)
    assert asked["pooler_config"].seq_pooling_type == "MEAN"
    assert asked["pooler_config"].use_activation is True
    assert asked["dtype"] == "bfloat16"
    assert arguments(declared, FP32, can_sleep=True)["dtype"] == "float32"


async def test_of_an_unknown_model_only_the_norm_is_stated(gemma: Path) -> None:
    asked = arguments(locate(str(gemma)), VLLMOptions(), can_sleep=False)
    assert asked["pooler_config"].seq_pooling_type is None
    assert asked["pooler_config"].use_activation is True
    assert asked["dtype"] == "auto"
    assert asked["trust_remote_code"] is False
    assert "max_model_len" not in asked
    assert "quantization" not in asked


@pytest.mark.parametrize(
    ("asked", "attention", "made", "splits"),
    [
        ("PIECEWISE", "ALWAYS", "FULL", 1),  # FlashAttention 3, on a Hopper card
        ("PIECEWISE", "UNIFORM_BATCH", "PIECEWISE", 32),  # FlashAttention 2
        ("NONE", "ALWAYS", "NONE", 32),  # eager
    ],
)
async def test_graphs_are_of_the_whole_model_where_attention_can_be_part_of_one(
    asked: str, attention: str, made: str, splits: int
) -> None:
    from vllm.config import AttentionConfig, CompilationConfig, CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport

    from modal_backend.engines.vllm.worker import make_whole

    compilation = CompilationConfig(cudagraph_mode=CUDAGraphMode[asked])
    config = SimpleNamespace(compilation_config=compilation, attention_config=AttentionConfig())
    make_whole(config, AttentionCGSupport[attention])
    assert compilation.cudagraph_mode == CUDAGraphMode[made]
    assert config.attention_config.flash_attn_max_num_splits_for_cuda_graph == splits


@pytest.mark.parametrize("step", [7, 8, 1000, 1024, 2048, 16_384, 20_000])
async def test_a_full_step_is_a_graph_and_none_is_larger(step: int) -> None:
    sizes = graph_sizes(step)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == step


async def test_options_reach_vllm(gemma: Path) -> None:
    options = VLLMOptions(
        quantization="fp8",
        max_model_len=512,
        max_num_batched_tokens=1024,
        max_num_seqs=7,
        enforce_eager=True,
        gpu_memory_utilization=0.5,
        prefix_caching=True,
    )
    asked = arguments(locate(str(gemma)), options, can_sleep=True)
    assert asked["quantization"] == "fp8_per_tensor"
    assert asked["max_model_len"] == 512
    assert asked["max_num_batched_tokens"] == 1024
    assert asked["max_num_seqs"] == 7
    assert asked["enforce_eager"] is True
    assert asked["gpu_memory_utilization"] == 0.5
    assert asked["enable_prefix_caching"] is True
    assert asked["enable_sleep_mode"] is True
    assert asked["scheduling_policy"] == "priority"


@pytest.mark.parametrize(("memory", "strategy"), [(10**12, "prefetch"), (10**4, None)])
async def test_weights_are_read_ahead_where_they_fit_into_memory(
    gemma: Path, monkeypatch: pytest.MonkeyPatch, memory: int, strategy: str | None
) -> None:
    monkeypatch.setattr("modal_backend.engines.vllm.config.memory_bytes", lambda: memory)
    asked = arguments(locate(str(gemma)), VLLMOptions(), can_sleep=False)
    assert asked["safetensors_load_strategy"] == strategy


# --- what was loaded


async def test_vllm_reads_weights_ahead_and_tunes_nothing(engine: VLLMEngine) -> None:
    made = engine._llm.vllm_config
    assert made.load_config.safetensors_load_strategy == "prefetch"
    assert made.kernel_config.enable_flashinfer_autotune is False


async def test_the_identity_is_that_of_the_loaded_folder(engine: VLLMEngine, gemma: Path) -> None:
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


async def test_of_a_known_model_the_files_of_its_repository_do_not_count(
    known: VLLMEngine,
) -> None:
    profile = profile_of("someone/known-gemma")
    assert known.identity == profile.space  # the commit is that of the cache
    assert known.dimensions == profile.dimensions
    assert known.max_tokens == 2048
    assert known.query_template == "Query: {text}"
    assert known._llm.model_config.encoder_config["max_seq_length"] == 64  # vLLM had read them
    assert known._llm.vllm_config.cache_config.enable_prefix_caching


# --- what is refused


def differing(engine: VLLMEngine, options: VLLMOptions = FP32, **identity: Any) -> str:
    """Why an engine would be refused, if these were its identity and what had been asked."""
    asked = arguments(locate(engine._llm.model_config.model), options, can_sleep=False)
    with pytest.raises(EngineLoadError) as caught:
        check(engine._llm.vllm_config, replace(engine.identity, **identity), options, asked)
    return str(caught.value)


async def test_what_was_asked_for_passes(engine: VLLMEngine, known: VLLMEngine) -> None:
    for loaded, options in (
        (engine, FP32),
        (engine, replace(FP32, dtype="auto")),
        (engine, replace(FP32, max_model_len=2048)),
        (known, replace(FP32, max_model_len=2048)),
    ):
        asked = arguments(locate(loaded._llm.model_config.model), options, can_sleep=False)
        check(loaded._llm.vllm_config, loaded.identity, options, asked)


async def test_each_difference_from_a_known_model_is_named(known: VLLMEngine) -> None:
    assert "pooling: 'last' != 'mean'" in differing(known, pooling="mean")
    assert "attention: 'causal' != 'bidirectional'" in differing(known, attention="bidirectional")
    assert "quantization: 'fp32' != 'bf16'" in differing(known, quantization="bf16")
    assert "normalized: True != False" in differing(known, normalized=False)
    both = differing(known, pooling="mean", attention="bidirectional")
    assert "pooling" in both
    assert "attention" in both


async def test_each_difference_from_what_was_asked_for_is_named(engine: VLLMEngine) -> None:
    assert "dtype: 'bf16' != 'fp32'" in differing(engine, replace(FP32, dtype="bf16"))
    assert "max_model_len: 512 != 2048" in differing(engine, replace(FP32, max_model_len=512))
    assert "quantization: 'fp8' != 'fp32'" in differing(engine, replace(FP32, quantization="fp8"))
    more = replace(FP32, max_num_batched_tokens=512)
    assert "max_num_batched_tokens: 512 != 256" in differing(engine, more)
    assert "normalized: True != False" in differing(engine, normalized=False)


async def test_other_dimensions_than_the_profile_s_are_refused(
    known: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = known.identity.model
    monkeypatch.setitem(models._KNOWN, name, replace(profile_of(name), dimensions=(3840, 128)))
    assert "dimensions: 3840 != 128" in differing(known)


async def test_a_model_that_should_see_both_ways_and_does_not_is_refused(tmp_path: Path) -> None:
    # vLLM heeds use_bidirectional_attention under Gemma3TextModel only.
    folder = tiny_gemma3(tmp_path, bidirectional=True)
    before = children()
    with pytest.raises(EngineLoadError, match=r"config\.json says bidirectional.*causal"):
        await VLLMEngine.load(locate(str(folder)), FP32)
    assert not left_behind(before)


# --- a load that fails


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
    ("break_it", "said"),
    [
        (broken_config, "config.json"),
        (unknown_architecture, "no_such_type"),
        (cut_weights, ""),  # seen by the core only, whose own words are in the log
    ],
)
async def test_a_load_that_fails_says_so_in_one_error_and_leaves_nothing_behind(
    tmp_path: Path, break_it: Callable[[Path], None], said: str
) -> None:
    folder = tiny_gemma3(tmp_path)
    break_it(folder)
    before = children()
    tasks = asyncio.all_tasks()
    started = time.monotonic()
    with pytest.raises(EngineLoadError) as caught:
        await VLLMEngine.load(locate(str(folder)), FP32)
    assert time.monotonic() - started < 500  # vLLM's own patience with a core is 600 s
    assert str(folder) in str(caught.value)
    assert said in str(caught.value)
    assert not left_behind(before)
    assert asyncio.all_tasks() == tasks
