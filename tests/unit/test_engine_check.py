"""The identity of a loaded model, and the check of its configuration. Without vLLM,
whose values are written out here; tests/vllm has the real ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kalm_integrations import models
from kalm_integrations.errors import EngineLoadError
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import ModelProfile
from modal_backend.engines.vllm.config import (
    VLLMOptions,
    check,
    dimensions_of,
    identity_of,
    kv_cache_bytes_of,
)
from modal_backend.weights import Weights

COMMIT = "0" * 40
WEIGHTS = Weights("someone/model", COMMIT, Path("/models/model"))
ARGUMENTS = {"enable_sleep_mode": True, "max_num_batched_tokens": 8192}
PLAIN = "UnquantizedLinearMethod"
FP8 = "fp8 weights per tensor, inputs per token"

SPACE = SpaceIdentity(
    model="someone/model",
    revision=COMMIT,
    pooling="last",
    normalized=True,
    attention="causal",
    quantization="bf16",
    profile=1,
)


def inspected(**changes: Any) -> dict[str, Any]:
    """What the worker says of KaLM."""
    return {
        "model_class": "Gemma3ForCausalLM",
        "pooling": "LastPool",
        "activation": "PoolerNormalize",
        "projector": False,
        "attention": ["decoder"],
        "windows": [1023],
        "dtypes": ["torch.bfloat16"],
        "linear": [PLAIN],
        "parameters": 1,
        **changes,
    }


def resolved(*, bidirectional: bool | None = None, **changes: Any) -> Any:
    """vLLM's configuration after loading."""
    text = SimpleNamespace(use_bidirectional_attention=bidirectional)
    model = {
        "hf_text_config": text,
        "runner_type": "pooling",
        "embedding_size": 3840,
        "max_model_len": 8192,
        "enable_sleep_mode": True,
        "dtype": "torch.bfloat16",
    }
    scheduler = {"max_num_batched_tokens": 8192, "policy": "priority"}
    for fields in (model, scheduler):
        fields.update((name, changes.pop(name)) for name in list(changes) if name in fields)
    assert not changes
    return SimpleNamespace(
        model_config=SimpleNamespace(**model), scheduler_config=SimpleNamespace(**scheduler)
    )


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """`SPACE` is what we know of its model."""
    profile = ModelProfile(
        space=SPACE, dimensions=(3840, 1024, 64), max_tokens=8192, query_template="{text}"
    )
    monkeypatch.setitem(models._KNOWN, SPACE.model, profile)


def refusal(
    identity: SpaceIdentity = SPACE,
    options: VLLMOptions | None = None,
    loaded: Any = None,
    arguments: dict[str, Any] = ARGUMENTS,
) -> str:
    with pytest.raises(EngineLoadError) as caught:
        check(loaded or resolved(), identity, options or VLLMOptions(), arguments)
    return str(caught.value)


# --- the identity


def test_the_identity_describes_the_loaded_model() -> None:
    assert identity_of(WEIGHTS, inspected()) == SPACE


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"pooling": "MeanPool"}, {"pooling": "mean"}),
        ({"pooling": "CLSPool"}, {"pooling": "cls"}),
        ({"pooling": "MaxPool"}, {"pooling": "MaxPool"}),
        ({"projector": True}, {"pooling": "last and projection"}),
        ({"activation": "NoneType"}, {"normalized": False}),
        ({"activation": "PoolerIdentity"}, {"normalized": False}),
        ({"attention": ["encoder_only"]}, {"attention": "bidirectional"}),
        (
            {"attention": ["decoder", "encoder_only"]},
            {"attention": "causal and bidirectional"},
        ),
        ({"dtypes": ["torch.float16"]}, {"quantization": "fp16"}),
        ({"dtypes": ["torch.float32"]}, {"quantization": "fp32"}),
        (
            {"dtypes": ["torch.bfloat16", "torch.float32"]},
            {"quantization": "bf16 and fp32"},
        ),
        ({"linear": [FP8]}, {"quantization": FP8}),
        ({"linear": [PLAIN, FP8]}, {"quantization": FP8}),
        ({"linear": ["fp8 weights"]}, {"quantization": "fp8 weights"}),
    ],
    ids=str,
)
def test_everything_that_changes_vectors_is_in_the_identity(
    found: dict[str, Any], named: dict[str, Any]
) -> None:
    assert identity_of(WEIGHTS, inspected(**found)) == replace(SPACE, **named)


# --- refused


@pytest.mark.usefixtures("known")
def test_a_known_model_passes() -> None:
    check(resolved(), SPACE, VLLMOptions(), ARGUMENTS)
    check(resolved(), replace(SPACE, revision="f" * 40), VLLMOptions(), ARGUMENTS)
    check(resolved(), replace(SPACE, quantization=FP8), VLLMOptions(quantization="fp8"), ARGUMENTS)


def test_any_space_of_an_unknown_model_passes() -> None:
    other = replace(SPACE, pooling="mean", attention="bidirectional", quantization="fp16")
    check(resolved(embedding_size=96), other, VLLMOptions(), ARGUMENTS)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pooling", "mean"),
        ("pooling", "last and projection"),
        ("attention", "bidirectional"),
        ("quantization", "fp16"),
        ("quantization", FP8),
        ("normalized", False),
        ("profile", 2),
    ],
)
def test_a_known_model_in_another_space_is_refused(field: str, value: Any) -> None:
    message = refusal(replace(SPACE, **{field: value}))
    assert f"{field}: {getattr(SPACE, field)!r} != {value!r}" in message


def test_every_difference_is_named_at_once() -> None:
    options = VLLMOptions(dtype="bf16")
    identity = replace(SPACE, quantization="fp16", normalized=False)
    wrong = {"policy": "fcfs", "runner_type": "generate", "max_num_batched_tokens": 4096}
    loaded = resolved(**wrong, enable_sleep_mode=False)
    message = refusal(identity, options, loaded)
    for name in ("normalized", "dtype", "runner", "max_num_batched", "scheduling", "sleep mode"):
        assert name in message


def test_a_different_dtype_is_refused() -> None:
    message = refusal(replace(SPACE, quantization="fp32"), VLLMOptions(dtype="bf16"))
    assert "dtype: 'bf16' != 'fp32'" in message


def test_fp8_weights_pass_as_their_own_space_and_missing_fp8_is_refused() -> None:
    options = VLLMOptions(quantization="fp8")
    check(resolved(), replace(SPACE, quantization="fp8 weights"), options, ARGUMENTS)
    assert "quantization: 'fp8' != 'bf16'" in refusal(options=options)


def test_causal_attention_of_a_bidirectional_configuration_is_refused() -> None:
    loaded = resolved(bidirectional=True)
    assert "config.json says bidirectional, what is loaded is causal" in refusal(loaded=loaded)
    check(loaded, replace(SPACE, attention="bidirectional"), VLLMOptions(), ARGUMENTS)


@pytest.mark.usefixtures("known")
def test_unexpected_dimensions_are_refused() -> None:
    assert "dimensions: 3840 != 128" in refusal(loaded=resolved(embedding_size=128))


def test_a_different_length_is_refused() -> None:
    message = refusal(
        loaded=resolved(max_model_len=512), arguments={**ARGUMENTS, "max_model_len": 8192}
    )
    assert "max_model_len: 8192 != 512" in message


def test_larger_steps_pass_and_smaller_ones_are_refused() -> None:
    check(resolved(max_num_batched_tokens=16_384), SPACE, VLLMOptions(), ARGUMENTS)
    message = refusal(loaded=resolved(max_num_batched_tokens=4096))
    assert "max_num_batched_tokens: 8192 != 4096" in message


# --- dimensions


@pytest.mark.usefixtures("known")
def test_dimensions_of_a_known_model_come_from_its_profile() -> None:
    config = SimpleNamespace(embedding_size=3840, matryoshka_dimensions=[512])
    assert dimensions_of(config, "someone/model") == (3840, 1024, 64)


@pytest.mark.parametrize(
    ("declared", "dimensions"),
    [(None, (128,)), ([], (128,)), ([32, 128, 64], (128, 64, 32)), ([256, 64], (128, 64))],
)
def test_dimensions_of_an_unknown_model_come_from_its_configuration(
    declared: list[int] | None, dimensions: tuple[int, ...]
) -> None:
    config = SimpleNamespace(embedding_size=128, matryoshka_dimensions=declared)
    assert dimensions_of(config, "unknown") == dimensions


# --- the KV cache


def kv_bytes(max_model_len: int, step: int) -> int:
    """For KaLM's shape."""
    model = SimpleNamespace(
        max_model_len=max_model_len,
        get_total_num_kv_heads=lambda: 8,
        get_head_size=lambda: 256,
        get_total_num_hidden_layers=lambda: 48,
        dtype=SimpleNamespace(itemsize=2),
    )
    return kv_cache_bytes_of(model, step)


def test_the_kv_cache_holds_two_steps_or_the_longest_text() -> None:
    token = 2 * 48 * 8 * 256 * 2
    assert kv_bytes(8192, 8192) > 2 * 8192 * token
    assert kv_bytes(32_768, 8192) > 32_768 * token
    assert kv_bytes(32_768, 8192) < 1.3 * 32_768 * token
    assert kv_bytes(1024, 8192) == kv_bytes(8192, 8192)


@pytest.mark.usefixtures("known")
def test_int8_weights_pass_as_their_own_space_and_only_if_requested() -> None:
    int8 = replace(SPACE, quantization="int8 weights, groups of 128")
    check(resolved(), int8, VLLMOptions(quantization="int8"), ARGUMENTS)
    assert "quantization" in refusal(int8)
    assert "quantization" in refusal(options=VLLMOptions(quantization="int8"))
    other = replace(SPACE, quantization="int8 weights, groups of 64")
    assert "groups of 64" in refusal(other, VLLMOptions(quantization="int8"))
