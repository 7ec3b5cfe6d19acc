"""The Modal app with vLLM: deployed by the real client, run by its real container runtime, with a
tiny model in the weights' volume. The cloud is an emulator, the GPU is this machine's CPU."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modal
import numpy as np
import psutil
import pytest
from kalm_served import named
from modal_emulator import Emulator
from modal_emulator.container import Container
from reference import cosines, reference_vectors
from texts import EDGE_TEXTS, many
from tiny_models import in_hub_cache, tiny_gemma3

from kalm_integrations import KalmClient, KalmModalEmbeddings
from kalm_integrations.errors import EngineLoadError, IdentityMismatchError

ROOT = Path(__file__).parents[2]
MODEL = "kalm-tests/tiny-gemma"
APP, CLASS = "vllm-embedding-snapshot", "VLLMEmbeddingSnapshot"
SERVICE = f"{APP}/{CLASS}"
TEXTS = [text for text in [*EDGE_TEXTS, *many(40)] if text.strip()]
PROXY_TOKEN = {"Modal-Key": "wk-emulated", "Modal-Secret": "ws-emulated"}
PHASES = ["load", "warm_up", "canary", "sleep", "wake", "canary_after"]


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    """With the app deployed, and this process's variables pointing at it."""
    # As on one GPU: the core runs the model itself.
    surroundings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    with Emulator(stop_grace=30, container_env=surroundings) as emulator:
        settings = {"KALM_DEPLOY_MODEL": MODEL, "KALM_DEPLOY_ENFORCE_EAGER": "1"}
        emulator.deploy("modal_backend.app", cwd=ROOT, env=settings)
        with pytest.MonkeyPatch.context() as patch, emulator.in_this_process(patch):
            yield emulator
        assert not emulator.unimplemented


@pytest.fixture(scope="module")
def without_weights(emulator: Emulator) -> EngineLoadError:
    """The error of a call before the weights are downloaded."""
    with pytest.raises(EngineLoadError) as caught:
        client().embed(["too early"])
    emulator.kill(SERVICE)
    emulator.wait(lambda: not emulator.running(SERVICE))
    return caught.value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gemma3(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def commit(emulator: Emulator, without_weights: EngineLoadError, folder: Path) -> str:
    """What the download leaves in the volume."""
    return in_hub_cache(folder, emulator.volume("hf-embedding-cache") / "hub", MODEL)


@pytest.fixture(scope="module")
def container(emulator: Emulator, commit: str) -> Container:
    """The first that found the weights."""
    with client(timeout=400) as waiting:
        waiting.warm_up()
    (running,) = emulator.running(SERVICE)
    return running


def client(**settings: Any) -> KalmClient:
    arguments = {"backend": "modal", "model": MODEL, "timeout": 400, "max_retries": 1}
    return KalmClient(**{**arguments, **settings})


def cores(container: Container) -> list[psutil.Process]:
    """vLLM's processes of a container."""
    return named("VLLM", psutil.Process(container.pid).children(recursive=True))


def test_missing_weights_give_an_error_that_names_the_download(
    without_weights: EngineLoadError,
) -> None:
    assert "modal run -m modal_backend.app::download_model_weights" in str(without_weights)
    assert MODEL in str(without_weights)


def test_vectors_and_identity_match_the_downloaded_model(
    container: Container, folder: Path, commit: str
) -> None:
    with client(vector_dtype="float32") as over_rpc:
        space = over_rpc.warm_up().space
        vectors = over_rpc.embed(TEXTS).vectors
    assert cosines(vectors, reference_vectors(folder, TEXTS)).min() >= 0.999  # bf16
    assert (space.model, space.revision) == (MODEL, commit)
    assert (space.pooling, space.attention, space.quantization) == ("last", "causal", "bf16")


def test_the_start_has_all_phases_and_a_snapshot(container: Container, emulator: Emulator) -> None:
    described = modal.Cls.from_name(APP, CLASS)().describe.remote()
    assert list(described["phases"]) == PHASES
    assert {"checkpoint", "restore"} <= set(container.events)
    assert "this platform has no sleep mode" in container.log


def test_rpc_and_http_give_the_same_vectors(container: Container, emulator: Emulator) -> None:
    key = {"modal_key": PROXY_TOKEN["Modal-Key"], "modal_secret": PROXY_TOKEN["Modal-Secret"]}
    url = emulator.web_url(SERVICE, "http")
    with (
        client(vector_dtype="float32") as over_rpc,
        KalmClient(base_url=url, model=MODEL, vector_dtype="float32", **key) as over_http,
    ):
        assert np.array_equal(over_rpc.embed(TEXTS).vectors, over_http.embed(TEXTS).vectors)
    embeddings = KalmModalEmbeddings(base_url=url, model=MODEL, **key)
    (document,) = embeddings.embed_documents([TEXTS[0]])
    assert len(document) == 128


def test_an_unexpected_model_is_refused_by_the_client(container: Container) -> None:
    with client(model=None) as expecting_kalm, pytest.raises(IdentityMismatchError):
        expecting_kalm.embed(TEXTS)


def test_a_container_whose_core_dies_is_replaced_and_leaves_no_process(
    container: Container, emulator: Emulator, folder: Path
) -> None:
    killed = cores(container)
    for process in killed:
        process.send_signal(signal.SIGKILL)
    emulator.wait(lambda: container.stopping or container.gone.is_set(), timeout=120)
    emulator.wait(container.gone.is_set, timeout=120)
    assert container.log.count("core process was ended by SIGKILL") < 20
    with client(vector_dtype="float32", timeout=400) as over_rpc:
        vectors = over_rpc.embed(TEXTS[:5]).vectors
    assert cosines(vectors, reference_vectors(folder, TEXTS[:5])).min() >= 0.999
    (other,) = emulator.running(SERVICE)
    assert other is not container
    alive = cores(other)
    assert alive
    emulator.stop_app(APP)
    assert not [process for process in killed + alive if process.is_running()]
