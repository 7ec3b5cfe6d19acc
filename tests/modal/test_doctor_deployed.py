"""`kalm doctor` for a deployed app. Modal's client and the container are real, Modal is not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import modal
import pytest
from diagnosis import SECRETS, Diagnosis, Doctor, read_text
from grpclib import GRPCError, Status
from modal.exception import AuthError
from modal_emulator import Emulator

from kalm_integrations.models import EMBEDDED, KALM
from modal_backend.tags import IDENTITY_TAG, VERSION_TAG

ROOT = Path(__file__).parents[2]
APP, CLASS = "vllm-embedding-snapshot", "VLLMEmbeddingSnapshot"
SERVICE = f"{APP}/{CLASS}"
DEPLOYED = ("token", "app", "app version", "app identity")
COLD = (*DEPLOYED, "class", "http endpoint")
AWAKE = ("container", "start", "identity", "warnings", "vectors", "latency")
PROXY = {"KALM_MODAL_KEY": "wk-emulated", "KALM_MODAL_SECRET": "ws-emulated"}


@pytest.fixture(scope="module")
def deployed(emulator: Emulator) -> Emulator:
    emulator.deploy("modal_backend.app", cwd=ROOT, env={"KALM_DEPLOY_ENGINE": "embedded"})
    return emulator


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def variables(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return variables


@pytest.fixture
def doctor(
    capfd: pytest.CaptureFixture[str],
    deployed: Emulator,
    variables: Callable[..., None],
) -> Iterator[Callable[..., Diagnosis]]:
    """Examines this process, whose client of Modal is made anew, from its variables, each time."""
    variables(**deployed.client_env, KALM_MODEL=EMBEDDED.space.model)
    examine = Doctor(capfd, as_json=True)

    def doctor(*arguments: str, **values: str) -> Diagnosis:
        variables(**values)
        modal.Client._set_env_client(None)
        try:
            return examine(*arguments)
        finally:
            with suppress(AuthError):
                modal.Client.from_env().close()

    yield doctor
    modal.Client._set_env_client(None)


@pytest.fixture(scope="module")
def kalm(deployed: Emulator) -> None:
    """The real model's app, in both of its quantizations; its image is never built."""
    for quantization, gpu in (("none", "A100-80GB"), ("fp8", "L40S")):
        settings = {
            "KALM_DEPLOY_APP_NAME": f"kalm-{quantization}",
            "KALM_DEPLOY_QUANTIZATION": quantization,
            "KALM_DEPLOY_GPU": gpu,
        }
        deployed.deploy("modal_backend.app", cwd=ROOT, env=settings)


@pytest.fixture(scope="module")
def older(deployed: Emulator, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A class of that name that has no packed method."""
    script = tmp_path_factory.mktemp("older") / "older.py"
    script.write_text(
        "import modal\n"
        "app = modal.App('older')\n"
        f"@app.cls(serialized=True)\nclass {CLASS}:\n"
        "    @modal.method()\n    def embed(self, sentences): ...\n"
    )
    deployed.deploy(str(script))


@pytest.fixture
def tagged(deployed: Emulator) -> Iterator[Callable[..., None]]:
    """Changes what Modal keeps with the app, as another version's deployment would have."""
    app = deployed.cloud.deployed_app(APP, "main")
    assert app is not None
    before = dict(app.tags)

    def tagged(tags: dict[str, str]) -> None:
        app.tags = tags

    yield tagged
    app.tags = before


def stopped_at(name: str, diagnosis: Diagnosis, *after: str) -> str:
    """Asserts that this check alone failed, and that those `after` it were skipped."""
    assert diagnosis.failed == [name]
    assert set(diagnosis.status(*after)) <= {"skipped"}
    return diagnosis.text(name)


class TestCold:
    """Whatever is wrong or right, no container starts: that costs money."""

    @pytest.fixture(autouse=True)
    def nothing_starts(self, deployed: Emulator) -> Iterator[None]:
        before = deployed.starts(SERVICE)
        yield
        assert deployed.starts(SERVICE) == before
        assert not deployed.unimplemented

    def test_all_good(self, doctor: Callable[..., Diagnosis], deployed: Emulator) -> None:
        diagnosis = doctor()
        assert diagnosis.exit_status == 0
        assert list(diagnosis.found)[4:] == [*COLD, *AWAKE]
        assert set(diagnosis.status(*COLD)) == {"ok"}
        assert set(diagnosis.status(*AWAKE)) == {"skipped"}
        assert 'backend="modal", since Modal\'s client and a token' in diagnosis.text("settings")
        assert "from MODAL_TOKEN_ID and MODAL_TOKEN_SECRET" in diagnosis.text("token")
        assert deployed.web_url(SERVICE, "http") in diagnosis.text("http endpoint")
        assert "--wake does it" in diagnosis.text("container")
        assert "No container was started" in diagnosis.summary

    def test_a_token_that_modal_refuses(self, doctor: Callable[..., Diagnosis]) -> None:
        shown = stopped_at("token", doctor(MODAL_TOKEN_SECRET="hunter2"), *COLD[1:], *AWAKE)
        assert "AuthError" in shown
        assert "→ Run `modal setup`, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET." in shown

    def test_an_app_that_is_not_deployed(self, doctor: Callable[..., Diagnosis]) -> None:
        shown = stopped_at("app", doctor(KALM_APP_NAME="absent"), *COLD[2:], *AWAKE)
        assert "'absent'" in shown
        assert "→ Run `kalm deploy`, or correct KALM_APP_NAME" in shown

    def test_an_app_without_that_class(self, doctor: Callable[..., Diagnosis]) -> None:
        shown = stopped_at("class", doctor(KALM_CLASS_NAME="Absent"), "http endpoint", *AWAKE)
        assert "class 'Absent'" in shown
        assert "KALM_CLASS_NAME" in shown

    def test_a_class_without_the_packed_method(
        self, doctor: Callable[..., Diagnosis], older: None
    ) -> None:
        diagnosis = doctor(KALM_APP_NAME="older")
        assert diagnosis.status(*DEPLOYED) == ["ok", "ok", "warn", "warn"]
        shown = stopped_at("class", diagnosis, "http endpoint", *AWAKE)
        assert "embed_packed" in shown
        assert "→ Run `kalm deploy`" in shown

    def test_a_deployment_of_another_version(
        self, doctor: Callable[..., Diagnosis], tagged: Callable[..., None]
    ) -> None:
        tagged({VERSION_TAG: "0.0.9", IDENTITY_TAG: EMBEDDED.space.fingerprint})
        diagnosis = doctor()
        assert diagnosis.exit_status == 0
        assert diagnosis.status(*COLD) == ["ok", "ok", "warn", "ok", "ok", "ok"]
        assert "version 0.0.9 is deployed" in diagnosis.text("app version")
        assert "→ Run `kalm deploy` again" in diagnosis.text("app version")
        assert "look at: app version" in diagnosis.summary

    def test_a_deployment_of_another_model(self, doctor: Callable[..., Diagnosis]) -> None:
        diagnosis = doctor("--wake", KALM_MODEL=KALM.space.model)  # known to be in vain
        shown = stopped_at("app identity", diagnosis, *AWAKE)
        assert f"serves {EMBEDDED.space.model}" in shown
        assert f"expects {KALM.space.model}" in shown
        assert f"set KALM_MODEL={EMBEDDED.space.model}" in shown

    def test_a_deployment_of_another_revision(self, doctor: Callable[..., Diagnosis]) -> None:
        expected = replace(EMBEDDED.space, revision="another")
        diagnosis = doctor(KALM_EXPECTED_IDENTITY=json.dumps(expected.to_dict()))
        assert expected.fingerprint in stopped_at("app identity", diagnosis, *AWAKE)

    def test_a_deployment_of_kalm(self, doctor: Callable[..., Diagnosis], kalm: None) -> None:
        expected = {"kalm-none": "kalm-bf16", "kalm-fp8": "kalm-fp8"}
        for name, space in expected.items():
            chosen = {"KALM_APP_NAME": name, "KALM_MODEL": KALM.space.model}
            assert doctor(**chosen, KALM_EXPECTED_IDENTITY=space).status("app identity") == ["ok"]
        # bf16 is what a client expects that says nothing.
        shown = stopped_at("app identity", doctor(**chosen, KALM_EXPECTED_IDENTITY=""), *AWAKE)
        assert "set KALM_EXPECTED_IDENTITY=kalm-fp8" in shown

    def test_a_deployment_of_something_unheard_of(
        self, doctor: Callable[..., Diagnosis], tagged: Callable[..., None]
    ) -> None:
        tagged({IDENTITY_TAG: "0123456789abcdef"})
        assert "0123456789abcdef" in stopped_at("app identity", doctor(), *AWAKE)
        diagnosis = doctor(KALM_MODEL="some/other-model")  # of which a client knows the name only
        assert diagnosis.status("app version", "app identity") == ["warn", "warn"]

    def test_modal_has_an_outage(
        self, doctor: Callable[..., Diagnosis], deployed: Emulator
    ) -> None:
        deployed.inject("AppGetTags", GRPCError(Status.INTERNAL, "outage"), times=50)
        try:
            shown = stopped_at("app", doctor(), *COLD[2:], *AWAKE)
        finally:
            deployed.cloud.recorder.faults["AppGetTags"].clear()
        assert "→ Check this machine's network, and status.modal.com." in shown


class TestTheDoorCold:
    """backend="http" without a URL: only names, ports and what Modal knows."""

    after = ("credentials", "identity", "warnings", "vectors", "latency")

    @pytest.fixture(autouse=True)
    def nothing_starts(self, deployed: Emulator) -> Iterator[None]:
        before = deployed.starts(SERVICE)
        yield
        assert deployed.starts(SERVICE) == before

    def test_all_good(self, doctor: Callable[..., Diagnosis], deployed: Emulator) -> None:
        diagnosis = doctor(KALM_BACKEND="http", **PROXY)
        names = [*DEPLOYED, "http endpoint", "keys", "network"]
        assert list(diagnosis.found)[4:] == [*names, *self.after]
        assert set(diagnosis.status(*names)) == {"ok"}
        assert set(diagnosis.status(*self.after)) == {"skipped"}
        assert diagnosis.text("http endpoint") == deployed.web_url(SERVICE, "http")
        assert diagnosis.text("keys") == "set: KALM_MODAL_KEY, _SECRET"

    def test_a_class_without_a_door(self, doctor: Callable[..., Diagnosis]) -> None:
        diagnosis = doctor(KALM_BACKEND="http", KALM_CLASS_NAME="Absent", **PROXY)
        shown = stopped_at("http endpoint", diagnosis, "network", *self.after)
        assert "→ Run `kalm deploy`" in shown


class TestAwake:
    def test_over_rpc(self, doctor: Callable[..., Diagnosis], deployed: Emulator) -> None:
        diagnosis = doctor("--wake", **SECRETS)
        assert diagnosis.exit_status == 0
        assert {status for status, _ in diagnosis.found.values()} == {"ok"}
        assert list(diagnosis.found)[4:] == [*COLD, *AWAKE]
        assert EMBEDDED.space.fingerprint in diagnosis.text("identity")
        assert "512 dimensions, length 1.000" in diagnosis.text("vectors")
        assert "any start included" in diagnosis.text("latency")
        assert re.fullmatch(
            r"load \d+\.\d s, .*, canary_after \d+\.\d s; restored .*", diagnosis.text("start")
        )
        assert diagnosis.summary == "All good."
        assert deployed.running(SERVICE)

    def test_a_snapshot_without_an_engine(
        self, doctor: Callable[..., Diagnosis], deployed: Emulator
    ) -> None:
        """Whatever wakes the service gets vectors; that each start is a full load, this tells."""
        variables = {"KALM_DEPLOY_ENGINE": "embedded", "KALM_DEPLOY_APP_NAME": "faulty"}
        deployed.deploy(ROOT / "tests/modal/apps/faulty_app.py", cwd=ROOT, env=variables)
        with deployed.changed(container_env={"FAULT": "prepare"}, restore_env={"FAULT": ""}):
            diagnosis = doctor("--wake", KALM_APP_NAME="faulty")
        deployed.stop_app("faulty")
        assert diagnosis.failed == ["warnings"]
        assert "snapshot_without_engine: " in diagnosis.text("warnings")
        assert "`kalm deploy` again" in diagnosis.text("warnings")
        assert "load_again_again" in diagnosis.text("start")

    def test_reference_texts_are_for_kalm_only(
        self, doctor: Callable[..., Diagnosis], deployed: Emulator
    ) -> None:
        diagnosis = doctor("--reference")
        assert list(diagnosis.found)[4:] == [*COLD, *AWAKE, "reference"]
        assert diagnosis.status(*AWAKE, "reference") == ["ok"] * 6 + ["skipped"]
        assert deployed.running(SERVICE)

    def test_over_http(self, doctor: Callable[..., Diagnosis]) -> None:
        diagnosis = doctor("--wake", KALM_BACKEND="http", **PROXY)
        assert {status for status, _ in diagnosis.found.values()} == {"ok"}
        assert "credentials" in diagnosis.found

    def test_a_proxy_token_that_modal_refuses(self, doctor: Callable[..., Diagnosis]) -> None:
        diagnosis = doctor("--wake", KALM_BACKEND="http", **SECRETS)
        shown = stopped_at("credentials", diagnosis, "identity", "vectors", "latency")
        assert "HTTP 401" in shown
        assert "KALM_MODAL_KEY and KALM_MODAL_SECRET to a token of modal.com" in shown

    def test_a_container_that_cannot_start(
        self, doctor: Callable[..., Diagnosis], deployed: Emulator
    ) -> None:
        before = deployed.starts(SERVICE)
        if deployed.running(SERVICE):
            deployed.kill(SERVICE)
        with deployed.changed(container_python=Path("/bin/false"), crashes_until_escalation=1):
            diagnosis = doctor("--wake", KALM_TIMEOUT="60")
        shown = stopped_at("container", diagnosis, *AWAKE[1:])
        assert "modal app logs" in shown
        assert deployed.starts(SERVICE) > before

    def test_a_container_that_serves_something_else(
        self, doctor: Callable[..., Diagnosis], tagged: Callable[..., None]
    ) -> None:
        expected = replace(EMBEDDED.space, revision="another")
        tagged({IDENTITY_TAG: expected.fingerprint})
        diagnosis = doctor("--wake", KALM_EXPECTED_IDENTITY=json.dumps(expected.to_dict()))
        shown = stopped_at("identity", diagnosis, "vectors", "latency")
        assert diagnosis.status("app identity", "container") == ["ok", "ok"]
        assert "revision: 'another' != " in shown


def test_as_it_is_typed(deployed: Emulator) -> None:
    shown = run("-m", "kalm_integrations.cli", "doctor", **deployed.client_env)
    found, summary = read_text(shown)
    assert found["token"][0] == "fail"
    assert summary.startswith("1 problem: token. First: Run `modal setup`")


def test_modal_is_not_reached() -> None:
    code = (
        "from kalm_integrations.cli import main; from kalm_integrations.doctor import base\n"
        "base.LIMIT = 0  # Modal's client itself would try for much longer\n"
        "raise SystemExit(main(['doctor']))"
    )
    shown = run("-c", code, MODAL_TOKEN_ID="hunter2", MODAL_SERVER_URL="http://127.0.0.1:9")
    found, summary = read_text(shown)
    assert found["token"][0] == "fail"
    assert "status.modal.com" in summary


def run(*arguments: str, **variables: str) -> str:
    """The command as a process of its own, with a wrong token; something must have failed."""
    around = {n: v for n, v in os.environ.items() if not n.startswith(("MODAL_", "KALM_"))}
    given = {"MODAL_CONFIG_PATH": os.devnull, **variables, **SECRETS}
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env=around | given | {"MODAL_TOKEN_SECRET": "hunter2"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "hunter2" not in done.stdout
    return done.stdout
