"""The life cycle of a container in Modal's real runtime: start, snapshot, restore, failures.

The emulated cloud keeps the process at a checkpoint, so nothing is lost in a restore unless a test
removes it.
"""

from __future__ import annotations

import json
import re
import socketserver
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import modal
import numpy as np
import pytest
from modal_emulator import Emulator
from modal_emulator.container import Container
from modal_emulator.sandbox import isolation_works  # noqa: F401 (skipif asks it by name)

from kalm_integrations import KalmClient
from kalm_integrations.errors import CanaryFailedError, EngineLoadError
from kalm_integrations.models import EMBEDDED

ROOT = Path(__file__).parents[2]
FAULTY_APP = Path(__file__).parent / "apps" / "faulty_app.py"
CLASS = "VLLMEmbeddingSnapshot"
REAL, FAULTY = "vllm-embedding-snapshot", "faulty"
REPLACEMENT_DELAY = 3.0  # of faulty_app.py
TEXTS = [f"Fact number {i} is about K{i}." for i in range(20)]
LIFE = ["load", "warm_up", "canary", "sleep", "wake", "canary_after"]
AFRESH = ["load_again", "warm_up_again", "canary_again"]


@pytest.fixture(scope="module")
def emulator(new_emulator: Callable[..., Emulator]) -> Iterator[Emulator]:
    """Both apps deployed, and this process's variables pointing at them."""
    emulator = new_emulator()
    variables = {"KALM_DEPLOY_ENGINE": "embedded", "KALM_DEPLOY_AUTH": "proxy+bearer"}
    emulator.set_secret("kalm-api-key", {"KALM_API_KEY": "key-before"})
    emulator.deploy("modal_backend.app", cwd=ROOT, env=variables)
    emulator.deploy(FAULTY_APP, cwd=ROOT, env={**variables, "KALM_DEPLOY_APP_NAME": FAULTY})
    with pytest.MonkeyPatch.context() as patch, emulator.in_this_process(patch):
        yield emulator
    assert not emulator.unimplemented


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    with KalmClient(backend="local", vector_dtype="float32") as local:
        return local.embed(TEXTS).vectors


@pytest.fixture
def cold(emulator: Emulator) -> Iterator[Callable[[], list[Container]]]:
    """The containers of the faulty app that the test started; none runs before and after."""
    before = emulator.starts(f"{FAULTY}/{CLASS}")
    yield lambda: emulator.containers(f"{FAULTY}/{CLASS}")[before:]
    while emulator.running(f"{FAULTY}/{CLASS}"):
        emulator.kill(f"{FAULTY}/{CLASS}")
    emulator.wait(lambda: all(c.gone.is_set() for c in emulator.containers(f"{FAULTY}/{CLASS}")))


def client(app_name: str = FAULTY, **settings: Any) -> KalmClient:
    arguments = {"backend": "modal", "model": EMBEDDED.space.model, "vector_dtype": "float32"}
    return KalmClient(**{**arguments, "app_name": app_name, "timeout": 60, **settings})


def describe(app_name: str) -> dict[str, Any]:
    described: dict[str, Any] = modal.Cls.from_name(app_name, CLASS)().describe.remote()
    return described


def http(emulator: Emulator, app_name: str, path: str, key: str, **body: Any) -> tuple[int, str]:
    """Status and body of a request with the right proxy token and a bearer key."""
    request = urllib.request.Request(
        emulator.web_url(f"{app_name}/{CLASS}", "http") + path,
        data=json.dumps(body).encode() if body else None,
        headers={
            "Modal-Key": "wk-emulated",
            "Modal-Secret": "ws-emulated",
            "Authorization": f"Bearer {key}",
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


# -- without a fault ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def restored(emulator: Emulator) -> tuple[np.ndarray, Container]:
    """The first call, and its container. While that lay in its snapshot, the key was rotated and
    the environment became that of another machine."""
    name = f"{REAL}/{CLASS}"
    other_machine = {"MODAL_REGION": "elsewhere", "TZ": "Asia/Tokyo", "OMP_NUM_THREADS": "7"}
    with emulator.changed(restore_env=other_machine), ThreadPoolExecutor(1) as threads:
        with emulator.holding_restores():
            call = threads.submit(client(REAL).embed, TEXTS)
            emulator.wait(lambda: emulator.held(name), timeout=60)
            emulator.set_secret("kalm-api-key", {"KALM_API_KEY": "key-after"})
        vectors = call.result(timeout=60).vectors
    (container,) = emulator.containers(name)
    return vectors, container


def test_the_first_call_is_served_by_a_restored_container(
    restored: tuple[np.ndarray, Container], expected: np.ndarray
) -> None:
    vectors, container = restored
    assert np.allclose(vectors, expected, atol=1e-6)
    before, after = container.task_ids  # and with them the host names
    assert before != after


def test_phases_of_the_start_are_described_and_exported(
    emulator: Emulator, restored: tuple[np.ndarray, Container]
) -> None:
    _, container = restored
    phases = describe(REAL)["phases"]
    assert list(phases) == LIFE
    assert phases["load"] > phases["sleep"]
    assert 0 < sum(phases.values()) < container.events["ready"] - container.events["start"]
    _, metrics = http(emulator, REAL, "/metrics", "key-after")
    shown = re.findall(r'^kalm_start_seconds{phase="(\w+)"} (\S+)$', metrics, re.M)
    assert {name: float(seconds) for name, seconds in shown} == pytest.approx(phases)


def test_secrets_are_read_after_the_snapshot(
    emulator: Emulator, restored: tuple[np.ndarray, Container]
) -> None:
    assert http(emulator, REAL, "/ready", "key-after") == (200, '{"status":"ready"}')
    assert http(emulator, REAL, "/ready", "key-before")[0] == 401
    assert http(emulator, REAL, "/v1/models", "key-before")[0] == 401
    _, container = restored
    assert "key-" not in container.log


# -- with a fault -----------------------------------------------------------------


def test_wrong_vectors_after_a_restore_are_replaced_by_a_load_in_the_same_container(
    emulator: Emulator, cold: Callable[[], list[Container]], expected: np.ndarray
) -> None:
    with emulator.changed(container_env={"FAULT": "restored"}):
        assert np.allclose(client().embed(TEXTS).vectors, expected, atol=1e-6)
    assert list(describe(FAULTY)["phases"]) == [*LIFE, *AFRESH]
    (container,) = cold()
    assert "an engine that is not trusted is discarded" in container.log


def test_permanently_wrong_vectors_are_served_as_an_error_until_the_replacement(
    emulator: Emulator, cold: Callable[[], list[Container]], expected: np.ndarray
) -> None:
    wrong = (
        "invalid vectors of 7 of 7 texts; the first one got a vector of length 0.5000 instead of 1."
    )
    sent = len(calls(emulator))
    with emulator.changed(container_env={"FAULT": "always"}):
        with ThreadPoolExecutor(4) as threads:
            waiting = [threads.submit(client().embed, [text]) for text in TEXTS[:4]]
        errors = [call.exception() for call in waiting]
    assert [(type(error), error.args) for error in errors] == [(CanaryFailedError, (wrong,))] * 4
    with pytest.raises(CanaryFailedError):
        client().warm_up()
    assert len(calls(emulator)) == sent + 5  # none was tried again

    service = modal.Cls.from_name(FAULTY, CLASS)()
    for method in (service.embed, service.embed_with_metadata):
        with pytest.raises(RuntimeError, match=f"canary_failed: {wrong}"):
            method.remote(["a"])
    described = describe(FAULTY)
    assert described["error"]["code"] == "canary_failed"
    assert [name for name in described["phases"] if name.startswith("load")] == [
        "load",
        "load_again",
        "load_again_again",
    ]

    over_http = client(
        backend="http", modal_key="wk-emulated", modal_secret="ws-emulated", api_key="key-after"
    )
    with pytest.raises(CanaryFailedError, match=wrong):
        over_http.embed(["a"])
    for path in ("/ready", "/v1/models", f"/v1/models/{EMBEDDED.space.model}"):
        status, body = http(emulator, FAULTY, path, "key-after")
        assert (path, status, json.loads(body)["error"]["code"]) == (path, 503, "canary_failed")
    assert http(emulator, FAULTY, "/health", "key-after")[0] == 200
    status, metrics = http(emulator, FAULTY, "/metrics", "key-after")
    assert status == 200
    assert re.search(r'^kalm_requests_total{code="canary_failed"} 5\.0$', metrics, re.M), metrics

    (container,) = cold()  # one start for all of it
    assert f"this container serves nothing: {wrong}" in container.log
    assert "stop-fetching" not in container.events

    # It is replaced in order; the next call starts another container, which may be healthy.
    emulator.wait(container.gone.is_set, timeout=60)
    assert container.exit_status == 0
    answered = container.events["stop-fetching"] - container.events["ready"]
    assert answered > REPLACEMENT_DELAY - 1
    assert cold() == [container]
    assert np.allclose(client().embed(TEXTS).vectors, expected, atol=1e-6)
    assert len(cold()) == 2


def test_a_failed_load_is_served_as_an_error_by_one_container(
    emulator: Emulator, cold: Callable[[], list[Container]]
) -> None:
    with emulator.changed(container_env={"FAULT": "load"}):
        with pytest.raises(EngineLoadError, match="OSError: the disk is gone"):
            client().embed(["a"])
    with pytest.raises(EngineLoadError):
        client().embed(["b"])
    assert len(cold()) == 1


@pytest.mark.parametrize("fault", ["first-canary"])
def test_a_failure_before_the_snapshot_is_repaired_before_it(
    emulator: Emulator, cold: Callable[[], list[Container]], expected: np.ndarray, fault: str
) -> None:
    with emulator.changed(container_env={"FAULT": fault}):
        assert np.allclose(client().embed(TEXTS).vectors, expected, atol=1e-6)
    described = describe(FAULTY)
    phases = list(described["phases"])
    assert phases[-3:] == ["sleep", "wake", "canary_after"]
    assert "load_again" in phases
    assert (described["warnings"], described["restored"]) == ([], True)
    assert len(cold()) == 1


@pytest.mark.parametrize("fault", ["prepare", "missing"])
def test_containers_from_a_snapshot_without_an_engine_report_it(
    emulator: Emulator, cold: Callable[[], list[Container]], expected: np.ndarray, fault: str
) -> None:
    """The restored container loads the engine, serves, and warns."""
    emulator.set_secret("kalm-api-key", {"KALM_API_KEY": "key-after"})
    with emulator.changed(container_env={"FAULT": fault}, restore_env={"FAULT": ""}):
        assert np.allclose(client().embed(TEXTS).vectors, expected, atol=1e-6)
    described = describe(FAULTY)
    assert [warning["code"] for warning in described["warnings"]] == ["snapshot_without_engine"]
    assert described["restored"]
    # One that would fail again in the same way, or not in time, is not loaded again.
    loads = [name for name in described["phases"] if name.startswith("load")]
    assert len(loads) == {"prepare": 3, "missing": 2}[fault]

    _, body = http(emulator, FAULTY, "/v1/models", "key-after")
    assert json.loads(body)["data"][0]["warnings"] == described["warnings"]
    _, metrics = http(emulator, FAULTY, "/metrics", "key-after")
    assert 'kalm_warning{code="snapshot_without_engine"} 1.0' in metrics
    (container,) = cold()
    log = container.log
    assert log.index("snapshot_without_engine") < log.rindex("snapshot_without_engine")
    assert "--startup-timeout" not in log
    assert "startup-timeout" not in container.events


@pytest.mark.parametrize("fault", ["mixed-up"])
def test_warn_mode_serves_and_reports_an_engine_that_fails_the_canary(
    emulator: Emulator, cold: Callable[[], list[Container]], expected: np.ndarray, fault: str
) -> None:
    emulator.set_secret("kalm-api-key", {"KALM_API_KEY": "key-after"})
    with emulator.changed(container_env={"FAULT": fault, "CANARY": "warn"}):
        vectors = client().embed(TEXTS[:1]).vectors
        alone = expected[:1]
        assert np.allclose(vectors, alone[:, ::-1] if fault == "mixed-up" else alone, atol=1e-6)
        described = describe(FAULTY)
    assert list(described["phases"]) == LIFE  # asleep in the snapshot, awake after it
    assert [warning["code"] for warning in described["warnings"]] == ["canary_failed"]
    _, metrics = http(emulator, FAULTY, "/metrics", "key-after")
    assert 'kalm_warning{code="canary_failed"} 1.0' in metrics
    (container,) = cold()
    assert "ERROR modal_backend.lifecycle: canary_failed: " in container.log


def calls(emulator: Emulator) -> list[Any]:
    return [r for r in emulator.cloud.recorder.requests if r.name == "FunctionMap"]


# -- stale connections -------------------------------------------------------------------------
class Peer(socketserver.ThreadingTCPServer):
    """Answers each "?" with "!", until it hangs up."""

    daemon_threads = True
    block_on_close = False

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.server.connections.append(self.request)  # type: ignore[attr-defined]
            while self.request.recv(1):
                self.request.sendall(b"!")

    def __init__(self) -> None:
        self.connections: list[Any] = []
        super().__init__(("127.0.0.1", 0), self.Handler)

    def hang_up(self) -> None:
        for connection in self.connections:
            connection.shutdown(2)


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as peer:
        thread = threading.Thread(target=peer.serve_forever)
        thread.start()
        yield peer
        peer.shutdown()
        thread.join()


def test_a_connection_lost_in_the_snapshot_does_not_fail_the_first_call(
    emulator: Emulator,
    cold: Callable[[], list[Container]],
    peer: Peer,
    expected: np.ndarray,
) -> None:
    variables = {"FAULT": "connection", "PEER": str(peer.server_address[1])}
    with emulator.changed(container_env=variables), ThreadPoolExecutor(1) as threads:
        with emulator.holding_restores():
            call = threads.submit(client().embed, TEXTS)
            emulator.wait(lambda: [c for c in cold() if "checkpoint" in c.events], timeout=60)
            assert len(peer.connections) == 1
            peer.hang_up()
        assert np.allclose(call.result(timeout=60).vectors, expected, atol=1e-6)
    assert len(peer.connections) == 2
    assert list(describe(FAULTY)["phases"]) == [*LIFE, *AFRESH]
    (container,) = cold()
    assert "the peer has hung up" in container.log


@pytest.mark.skipif("not isolation_works()", reason="needs root and Linux namespaces")
def test_a_restore_on_a_host_with_another_name_serves(
    new_emulator: Callable[..., Emulator], expected: np.ndarray
) -> None:
    isolated = new_emulator(isolated=True)
    isolated.deploy("modal_backend.app", cwd=ROOT, env={"KALM_DEPLOY_ENGINE": "embedded"})
    with isolated.client() as caller:
        service: Any = modal.Cls.from_name(REAL, CLASS, client=caller)()
        vectors = service.embed.remote(TEXTS)
    assert np.allclose(vectors, expected, atol=1e-6)
    (container,) = isolated.containers(CLASS)
    before, after = container.task_ids  # the machine is named after the task
    assert before != after
    assert isolated.starts(CLASS) == 1
