"""What the other tests of this folder stand on, checked without vLLM: the models are the same on
every run, their vectors tell texts apart, and each thing that can be wrong moves them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts as some
import torch
from reference import cosines, hidden_states, load, reference_vectors, token_ids
from retrieval_set import PASSAGES, QUERIES, RIGHT, recall_at_1
from tiny_models import (
    GEMMA_SPECIAL,
    SLIDING_WINDOW,
    corrupt_folder,
    in_hub_cache,
    noise,
    scale,
    sentence_transformers_files,
    tiny_gemma3,
    tiny_qwen2,
)
from transformers import AutoModel, AutoTokenizer

QWEN = {"pooling": "mean", "bidirectional": True}
LENGTHS = (2, 3, 8, 31, 32, 33, 64, 65, 150, 300, 700)
GEMMA_IDS = [2, 299, 308, 343, 380, 329, 327, 386, 556, 349, 70]
GEMMA_VECTOR = [-0.0329, -0.0925, -0.0159, 0.0909]
QWEN_VECTOR = [0.1735, 0.1270, -0.0527, -0.0577]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gemma3(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def long_texts(gemma: Path) -> list[str]:
    return [some.text_of_tokens(gemma, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def right(gemma: Path, long_texts: list[str]) -> np.ndarray:
    return reference_vectors(gemma, long_texts)


def _hashes(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


# --- the folders


@pytest.mark.parametrize("build", [tiny_gemma3, tiny_qwen2])
def test_the_same_folder_on_every_run(tmp_path: Path, build: Any) -> None:
    assert _hashes(build(tmp_path / "a")) == _hashes(build(tmp_path / "b"))
    other = _hashes(build(tmp_path / "c", seed=1))
    differ = {name for name, value in _hashes(tmp_path / "a").items() if other[name] != value}
    assert differ == {"model.safetensors"}


def test_the_weights_are_what_they_were(gemma: Path, qwen: Path) -> None:
    # Figures recorded of them are worth something only as long as these stay.
    assert token_ids(gemma, "What is a vector?") == GEMMA_IDS
    (vector,) = reference_vectors(gemma, ["What is a vector?"])
    np.testing.assert_allclose(vector[:4], GEMMA_VECTOR, atol=1e-3)
    (vector,) = reference_vectors(qwen, ["What is a vector?"], **QWEN)
    np.testing.assert_allclose(vector[:4], QWEN_VECTOR, atol=1e-3)


def test_formats_hold_the_same_model(gemma: Path, qwen: Path, tmp_path: Path) -> None:
    texts = [*some.EDGE_TEXTS, *some.many(10)]
    other = tiny_gemma3(tmp_path / "g", architecture="Gemma3TextModel")
    same = cosines(reference_vectors(gemma, texts), reference_vectors(other, texts))
    assert same.min() > 0.999999
    other = tiny_qwen2(tmp_path / "q", architecture="Qwen2ForCausalLM")
    same = cosines(reference_vectors(qwen, texts, **QWEN), reference_vectors(other, texts, **QWEN))
    assert same.min() > 0.999999


def test_gemma_has_the_shape_of_the_large_one(gemma: Path) -> None:
    config = load(gemma).config
    assert config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert config.num_attention_heads == 2 * config.num_key_value_heads
    assert config.head_dim != config.hidden_size // config.num_attention_heads
    assert config.rope_parameters == {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert config.sliding_window == SLIDING_WINDOW
    assert config.dtype == torch.float32  # as asked; the folder says:
    assert AutoModel.from_pretrained(gemma).dtype == torch.bfloat16


# --- tokenizers


def test_any_text_is_encodable_and_bos_comes_first(gemma: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gemma)
    assert tokenizer.convert_tokens_to_ids(list(GEMMA_SPECIAL)) == list(range(len(GEMMA_SPECIAL)))
    for text in [*some.EDGE_TEXTS, ""]:
        ids = token_ids(gemma, text)
        assert ids[0] == tokenizer.bos_token_id
        assert not set(ids[1:]) & set(range(len(GEMMA_SPECIAL))), text
        assert tokenizer.decode(ids[1:]) == text.replace("▁", " ")
    # Without care they are parsed:
    assert tokenizer("a <bos> b")["input_ids"].count(tokenizer.bos_token_id) == 2


def test_qwen_has_no_bos(qwen: Path) -> None:
    assert token_ids(qwen, "") == []
    assert all(token_ids(qwen, text) for text in some.EDGE_TEXTS)
    assert max(token_ids(qwen, "<|endoftext|>")) < 1277


@pytest.mark.parametrize("tokens", [*range(2, 40), 64, 65, 127, 500, 2048])
def test_texts_of_exactly_so_many_tokens(gemma: Path, qwen: Path, tokens: int) -> None:
    for path in (gemma, qwen):
        text = some.text_of_tokens(path, tokens)
        assert len(token_ids(path, text)) == tokens
        assert text != some.text_of_tokens(path, tokens, seed=1)


def test_no_text_is_shorter_than_bos_and_a_token(gemma: Path) -> None:
    with pytest.raises(ValueError, match="no text has 1 tokens"):
        some.text_of_tokens(gemma, 1)


# --- vectors


def test_different_texts_are_far_apart(gemma: Path) -> None:
    texts = [*some.EDGE_TEXTS, *(some.prose(n, seed=n) for n in (1, 2, 5, 20, 60, 200))]
    vectors = reference_vectors(gemma, texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for dimensions in (128, 64, 32):
        cut = vectors[:, :dimensions] / np.linalg.norm(vectors[:, :dimensions], axis=1)[:, None]
        others = cut @ cut.T - 2 * np.eye(len(texts))
        assert others.max() < 0.9


def test_bfloat16_stays_near(gemma: Path, long_texts: list[str], right: np.ndarray) -> None:
    rounded = reference_vectors(gemma, long_texts, dtype=torch.bfloat16)
    assert cosines(right, rounded).min() > 0.9993


def _moved(right: np.ndarray, wrong: np.ndarray, least: int) -> None:
    """Seen by each text from `least` tokens on, and clearly by some."""
    found = cosines(right, wrong)[[i for i, length in enumerate(LENGTHS) if length >= least]]
    assert found.min() < 0.99, found
    assert found.max() < 0.9995, found


@pytest.mark.parametrize(
    ("wrong", "least"),
    [
        ({"sliding_window": 2 * SLIDING_WINDOW}, SLIDING_WINDOW + 1),
        ({"sliding_window": SLIDING_WINDOW - 1}, SLIDING_WINDOW),
        ({"sliding_window": SLIDING_WINDOW + 1}, SLIDING_WINDOW + 1),
        ({"rope_local_base_freq": 1e6}, 8),
        ({"rope_theta": 1e4}, 64),
        ({"rope_scaling": {"rope_type": "default"}}, 8),
        ({"config": {"query_pre_attn_scalar": 16}}, 2),
        ({"config": {"rms_norm_eps": 0.1}}, 2),
        ({"config": {"layer_types": ["sliding_attention"] * 6}}, SLIDING_WINDOW + 1),
        ({"seed": 1}, 2),
        ({"corrupt": noise(".norm.")}, 2),
        ({"corrupt": noise(".layers.3.mlp.down_proj")}, 2),
        ({"corrupt": scale(".layers.5.self_attn.q_proj", -1)}, 8),
        ({"corrupt": scale("norm.", 0)}, 2),
        ({"corrupt": scale(".embed_tokens", 2)}, 2),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_in_the_folder_shows(
    tmp_path: Path, long_texts: list[str], right: np.ndarray, wrong: dict[str, Any], least: int
) -> None:
    _moved(right, reference_vectors(tiny_gemma3(tmp_path, **wrong), long_texts), least)


def test_a_missing_bos_shows(tmp_path: Path, long_texts: list[str], right: np.ndarray) -> None:
    path = tiny_gemma3(tmp_path, bos=False)
    assert len(token_ids(path, long_texts[1])) == LENGTHS[1] - 1
    found = cosines(right, reference_vectors(path, long_texts))
    assert found[LENGTHS.index(150)] < 0.999
    assert found[: LENGTHS.index(64)].max() < 0.95


@pytest.mark.parametrize(
    "wrong", [{"pooling": "mean"}, {"pooling": "cls"}, {"bidirectional": True}]
)
def test_wrong_pooling_and_direction_show(
    gemma: Path, long_texts: list[str], right: np.ndarray, wrong: dict[str, Any]
) -> None:
    assert cosines(right, reference_vectors(gemma, long_texts, **wrong)).max() < 0.99


def test_the_config_can_ask_for_both_directions(
    tmp_path: Path, gemma: Path, long_texts: list[str], right: np.ndarray
) -> None:
    path = tiny_gemma3(tmp_path, bidirectional=True)
    asked = reference_vectors(path, long_texts, bidirectional=None)
    assert cosines(right, asked).max() < 0.99
    assert np.array_equal(asked, reference_vectors(gemma, long_texts, bidirectional=True))
    # What is said outright wins.
    assert np.array_equal(right, reference_vectors(path, long_texts))


def test_a_folder_is_corrupted_in_place(tmp_path: Path) -> None:
    path = tiny_gemma3(tmp_path)
    (before,) = reference_vectors(path, ["some text"])
    assert corrupt_folder(path, noise(".layers.0.self_attn.v_proj")) == path
    (after,) = reference_vectors(path, ["some text"])
    assert before @ after < 0.99
    with pytest.raises(ValueError, match="no weight is called"):
        corrupt_folder(path, scale("v_prjo", 2))


def test_a_missing_weight_is_an_error(tmp_path: Path) -> None:
    path = tiny_gemma3(tmp_path)
    corrupt_folder(path, lambda weights: [weights.pop(k) for k in list(weights) if "q_norm" in k])
    with pytest.raises(ValueError, match="q_norm"):
        reference_vectors(path, ["a"])


def test_qwen_sees_both_ways(qwen: Path, tmp_path: Path) -> None:
    ids = token_ids(qwen, "the first state knows of the last token")
    other = [*ids[:-1], ids[0]]
    for bidirectional in (True, None, False):
        model = load(qwen, bidirectional=bidirectional)
        first, second = (
            hidden_states(model, each, bidirectional=bidirectional)[0] for each in (ids, other)
        )
        assert torch.equal(first, second) == (bidirectional is False)


def test_qwen_set_up_wrongly_shows(qwen: Path, tmp_path: Path) -> None:
    texts = [some.text_of_tokens(qwen, length) for length in (8, 16, 32, 64)]
    vectors = reference_vectors(qwen, texts, **QWEN)
    assert cosines(vectors, reference_vectors(qwen, texts, pooling="mean")).max() < 0.9
    assert cosines(vectors, reference_vectors(qwen, texts, bidirectional=True)).max() < 0.9
    assert (
        cosines(vectors, reference_vectors(qwen, texts, **{**QWEN, "pooling": "cls"})).max() < 0.9
    )
    noisy = tiny_qwen2(tmp_path, corrupt=noise(".norm."))
    assert cosines(vectors, reference_vectors(noisy, texts, **QWEN)).max() < 0.99
    different = reference_vectors(qwen, [some.prose(n, seed=n) for n in range(1, 9)], **QWEN)
    assert (different @ different.T - 2 * np.eye(8)).max() < 0.9


# --- the rest


def test_files_of_sentence_transformers(tmp_path: Path) -> None:
    path = sentence_transformers_files(tiny_gemma3(tmp_path), pooling="cls", max_seq_length=64)
    assert '"pooling_mode_cls_token": true' in (path / "1_Pooling/config.json").read_text()
    assert '"max_seq_length": 64' in (path / "sentence_bert_config.json").read_text()
    assert (path / "modules.json").read_text().count('"idx"') == 3


def test_a_cache_of_the_hub(gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import snapshot_download

    main = in_hub_cache(gemma, tmp_path, "someone/kalm")
    fields: dict[str, Any] = {"repo_id": "someone/kalm", "cache_dir": tmp_path}
    found = snapshot_download(local_files_only=True, **fields)
    assert found.endswith(main)
    assert _hashes(Path(found)) == _hashes(gemma)
    other = tiny_gemma3(tmp_path / "other", architecture="Gemma3TextModel")
    commit = in_hub_cache(other, tmp_path, "someone/kalm", revision="text", commit="f" * 40)
    assert commit == "f" * 40
    found = snapshot_download(local_files_only=True, revision="text", **fields)
    assert _hashes(Path(found)) == _hashes(other)
    assert snapshot_download(local_files_only=True, revision=main, **fields).endswith(main)


def test_many_texts_repeat_some() -> None:
    texts = some.many(200)
    assert texts == some.many(200)
    assert len(texts) == 200
    assert 170 <= len(set(texts)) <= 180
    assert some.prose(0) == ""
    assert len(set(some.EDGE_TEXTS)) == len(some.EDGE_TEXTS)


def test_the_retrieval_set_is_whole() -> None:
    assert (len(PASSAGES), len(QUERIES), len(RIGHT)) == (90, 42, 42)
    assert len(set(PASSAGES)) == 90
    assert len(set(QUERIES)) == 42
    eye = np.eye(90, dtype=np.float32)
    assert recall_at_1(eye[list(RIGHT)], eye) == 1
    assert recall_at_1(eye[[0] * 42], eye) == 1 / 42
