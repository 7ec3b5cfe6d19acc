"""Which weights are meant, whether they are all there, and which ones exactly they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from kalm_integrations import models
from kalm_integrations.errors import EngineLoadError
from kalm_integrations.models import KALM
from modal_backend.weights import Weights, locate, pinned_revision

COMMIT = "0123456789abcdef0123456789abcdef01234567"
KALM_NAME = KALM.space.model


def model(folder: Path, **files: str) -> Path:
    """What `locate` takes for a model: a configuration and weights."""
    contents = {"config.json": "{}", "model.safetensors": "weights"} | files
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = content.encode()
        if name.endswith(".safetensors"):
            data = save({}, metadata={"content": content})
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache: Path, name: str, *, revision: str = "main", commit: str = COMMIT) -> Path:
    """A repository in the cache, as a download leaves it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    return model(repository / "snapshots" / commit)


# --- a folder


def test_a_folder_has_its_own_name_and_the_digest_of_its_files(tmp_path: Path) -> None:
    weights = locate(str(model(tmp_path / "my-model")))
    assert weights.name == "my-model"
    assert weights.folder == tmp_path / "my-model"
    kind, digest = weights.revision.split(":")
    assert kind == "sha256"
    assert len(digest) == 64


def test_equal_files_have_equal_digests(tmp_path: Path) -> None:
    one, other = (locate(str(model(tmp_path / name))) for name in ("one", "other"))
    assert one.revision == other.revision


@pytest.mark.parametrize(
    "change",
    [
        {"model.safetensors": "weightt"},
        {"config.json": "{ }"},
        {"tokenizer.json": "{}"},
        {"1_Pooling/config.json": "{}"},
        {"modules.json": "[]"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_files_that_may_decide_a_vector_change_the_digest(
    tmp_path: Path, change: dict[str, str]
) -> None:
    before = locate(str(model(tmp_path)))
    after = locate(str(model(tmp_path, **change)))
    assert before.revision != after.revision


def test_a_moved_file_changes_the_digest(tmp_path: Path) -> None:
    before = locate(str(model(tmp_path, **{"a/tokenizer.json": "{}"})))
    (tmp_path / "a").rename(tmp_path / "b")
    assert locate(str(tmp_path)).revision != before.revision


def test_other_files_do_not_change_the_digest(tmp_path: Path) -> None:
    before = locate(str(model(tmp_path)))
    after = locate(str(model(tmp_path, **{"README.md": "!", ".git/HEAD": "!", ".cache/x": "!"})))
    assert before.revision == after.revision


def test_relative_and_home_paths_are_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "here"
    assert {locate(name).folder for name in ("here", "./here", "~/here")} == {folder}
    monkeypatch.chdir(folder)
    assert locate(".").name == "here"


@pytest.mark.parametrize("name", ["./absent", "/absent", "~/absent", "../absent"])
def test_a_missing_folder_is_refused(name: str) -> None:
    with pytest.raises(EngineLoadError, match=f"^{name} is not a folder"):
        locate(name)


# --- the Hugging Face cache


def test_the_revision_of_a_cached_repository_is_its_commit(cache: Path) -> None:
    folder = cached(cache, "someone/model")
    assert locate("someone/model") == Weights("someone/model", COMMIT, folder)
    assert locate("someone/model", COMMIT).revision == COMMIT


def test_a_branch_is_resolved_to_its_commit(cache: Path) -> None:
    other = "f" * 40
    cached(cache, "someone/model")
    cached(cache, "someone/model", revision="CausalLM", commit=other)
    assert locate("someone/model", "CausalLM").revision == other
    assert locate("someone/model").revision == COMMIT


def test_a_snapshot_folder_has_the_name_of_its_repository(cache: Path) -> None:
    folder = cached(cache, "someone/a--model")
    assert locate(str(folder)) == Weights("someone/a--model", COMMIT, folder)


def test_a_missing_repository_gives_an_error_with_the_download_command(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineLoadError) as caught:
        locate("someone/model", "CausalLM")
    said = str(caught.value)
    assert "someone/model at CausalLM are not on this machine" in said
    assert "hf download someone/model --revision CausalLM" in said
    monkeypatch.setenv("MODAL_TASK_ID", "ta-1")  # in a container of Modal's
    with pytest.raises(EngineLoadError) as caught:
        locate("someone/model", "CausalLM")
    said = str(caught.value)
    assert "someone/model at CausalLM are not in the Volume" in said
    assert "KALM_DEPLOY_MODEL=someone/model modal run" in said
    assert "`kalm deploy` again" in said


@pytest.mark.parametrize("name", ["not a model", "a/b/c", "someone/", "model?"])
def test_an_invalid_name_is_refused(cache: Path, name: str) -> None:
    with pytest.raises(EngineLoadError, match="neither a folder nor the name of a repository"):
        locate(name)


def test_known_models_have_a_pinned_revision(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = replace(KALM.space, revision=COMMIT, pooling="last")
    monkeypatch.setitem(models._KNOWN, KALM_NAME, replace(KALM, space=space))
    cached(cache, KALM_NAME, commit="f" * 40)
    cached(cache, KALM_NAME, revision="CausalLM")
    assert pinned_revision(KALM_NAME) == COMMIT
    assert locate(KALM_NAME).revision == COMMIT
    assert locate(KALM_NAME, "main").revision == "f" * 40


def test_other_models_use_the_main_branch() -> None:
    assert pinned_revision("someone/model") == "main"


# --- whether it is whole


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_configuration_or_weights_is_refused(tmp_path: Path, missing: str) -> None:
    (model(tmp_path) / missing).unlink()
    with pytest.raises(EngineLoadError, match=f"lacks .*{Path(missing).suffix}: run the download"):
        locate(str(tmp_path))


def test_an_incomplete_download_is_refused_with_the_missing_files(cache: Path) -> None:
    folder = cached(cache, "someone/model")
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = {"weight_map": {f"layer.{number}": shard for number, shard in enumerate(shards)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / shards[1]).write_text("weights")
    with pytest.raises(EngineLoadError) as caught:
        locate("someone/model")
    assert f"lacks {shards[0]}, {shards[2]}: run the download again" in str(caught.value)
    for shard in shards:
        (folder / shard).write_bytes(save({}))
    assert locate("someone/model").revision == COMMIT


@pytest.mark.parametrize("content", [b"", b"weights", save({"a": np.ones(100)})[:-1]])
def test_a_truncated_weights_file_is_named(tmp_path: Path, content: bytes) -> None:
    (model(tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(EngineLoadError, match=r"model\.safetensors is damaged .*: run"):
        locate(str(tmp_path))


@pytest.mark.parametrize("content", ["", "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    model(tmp_path, **{"model.safetensors.index.json": content})
    with pytest.raises(EngineLoadError, match=r"index\.json is damaged"):
        locate(str(tmp_path))


def test_a_copy_of_kalm_without_its_commit_is_refused(tmp_path: Path) -> None:
    """It would lack its prompts, its checks and its name."""
    folder = model(tmp_path / KALM.space.model.rpartition("/")[2])
    with pytest.raises(EngineLoadError, match="without --local-dir") as told:
        locate(str(folder))
    assert f"--revision {KALM.space.revision}" in str(told.value)


def test_a_file_of_the_cache_that_was_deleted_is_missing(cache: Path) -> None:
    weights = cached(cache, "someone/model") / "model.safetensors"
    weights.unlink()
    weights.symlink_to("../../blobs/gone")
    with pytest.raises(EngineLoadError, match="lacks"):
        locate("someone/model")
