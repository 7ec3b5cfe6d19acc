"""`kalm doctor` where no Modal is: every failure is caused for real, and names what to do."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import trustme
from diagnosis import SECRETS, Diagnosis, Doctor
from kalm import BF16, FP8, KalmEngine, similar
from pydantic import SecretStr
from serving import FaultyServer, Received, Step, embedded_engine, packed, reply, serving, stall

from kalm_integrations import reference
from kalm_integrations.cli import main
from kalm_integrations.config import ClientConfig
from kalm_integrations.doctor import base, machine, over_http
from kalm_integrations.doctor.base import Check, DoctorContext, Finding
from kalm_integrations.errors import KalmError, subclasses
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import EMBEDDED
from kalm_integrations.protocol import EmbedRequest, EmbedResponse, ServiceWarning
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.service import EmbeddingService

ROOT = Path(__file__).parents[2]
MODEL = EMBEDDED.space.model
MACHINE = ("python", "packages", "variables", "settings")
SERVICE = ("identity", "warnings", "vectors", "latency")


@pytest.fixture(autouse=True)
def nobody_elses_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MODAL_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MODAL_CONFIG_PATH", os.devnull + "/none")


@pytest.fixture
def doctor(request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]) -> Doctor:
    """Reads the JSON document; in tests marked `both`, what people read too."""
    return Doctor(capfd, as_json=getattr(request, "param", "json") == "json")


both = pytest.mark.parametrize("doctor", ["text", "json"], indirect=True)


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def variables(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return variables


@pytest.fixture
def over(variables: Callable[..., None]) -> Callable[[str], None]:
    """Points the environment at a service over HTTP, with secrets in it."""

    def over(url: str) -> None:
        variables(KALM_BASE_URL=url, KALM_MODEL=MODEL, **SECRETS)

    return over


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    engine = EmbeddingService(embedded_engine())
    keys = BearerKeys([SecretStr(SECRETS["KALM_API_KEY"])])
    with serving(create_app(engine, keys=keys)) as url:
        yield url


@dataclass
class Server(FaultyServer):
    """Has `/health` too, and says of itself what it is told to."""

    health: Step = field(default_factory=lambda: reply(200))
    models: Step | None = None
    short_text: Step | None = None

    async def _respond(self, request: Received, writer: object) -> None:
        step = self.health if request.path == "/health" else None
        if request.path.endswith("/models"):
            step = self.models
        if request.is_short_text:  # with which the client gets to know servers that are not ours
            step = self.short_text or self.models
        await (step or super()._respond)(request, writer)  # type: ignore[arg-type]


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def stopped_at(name: str, diagnosis: Diagnosis, *after: str) -> str:
    """Asserts that this check alone failed, and that those `after` it were skipped."""
    assert diagnosis.failed == [name]
    assert set(diagnosis.status(*after)) <= {"skipped"}
    return diagnosis.text(name)


@both
class TestAllGood:
    def test_the_embedded_engine(self, doctor: Doctor, variables: Callable[..., None]) -> None:
        variables(KALM_BACKEND="local", KALM_TIMEOUT="60")
        diagnosis = doctor()
        assert diagnosis.exit_status == 0
        assert list(diagnosis.found) == [*MACHINE, "engine", *SERVICE]
        assert {status for status, _ in diagnosis.found.values()} == {"ok"}
        assert diagnosis.summary == "All good."
        assert 'backend="local", since KALM_BACKEND says so' in diagnosis.text("settings")
        assert "KALM_TIMEOUT=60" in diagnosis.text("settings")
        assert EMBEDDED.space.fingerprint in diagnosis.text("identity")
        assert "512 dimensions, length 1.000" in diagnosis.text("vectors")
        assert re.search(r"then \d+ ms a query", diagnosis.text("latency"))
        assert "waiting for the service" not in diagnosis.shown + diagnosis.errors

    def test_over_http(self, doctor: Doctor, over: Callable[[str], None], service: str) -> None:
        over(service)
        diagnosis = doctor()
        names = [*MACHINE, "network", "health", "credentials", *SERVICE]
        assert list(diagnosis.found) == names
        assert {status for status, _ in diagnosis.found.values()} == {"ok"}
        shown = diagnosis.text("settings")
        assert 'backend="http", since KALM_BASE_URL is set' in shown
        assert "KALM_API_KEY: set" in shown

    def test_each_of_several_servers(
        self, doctor: Doctor, over: Callable[[str], None], service: str
    ) -> None:
        over(f"{service},http://127.0.0.1:{closed_port()},{service}/v1")
        diagnosis = doctor()
        assert "refused" in stopped_at("server 2", diagnosis)
        assert diagnosis.status("server 3") == ["ok"]

    def test_servers_of_two_identities(
        self, doctor: Doctor, over: Callable[[str], None], service: str
    ) -> None:
        with FaultyServer(ours=False) as other:
            over(f"{service},{other.url}")
            assert "server 2" in doctor().failed

    def test_waiting_is_announced(self, doctor: Doctor, variables: Callable[..., None]) -> None:
        variables(KALM_BACKEND="local", KALM_TIMEOUT="77")
        diagnosis = doctor("--wake")
        announced = diagnosis.errors if doctor.as_json else diagnosis.shown
        assert "waiting for the service, for up to 77 s" in announced


class TestThisMachine:
    def package(self, path: Path, name: str, version: str) -> None:
        """Metadata that importlib.metadata finds first."""
        (path / f"{name}-{version}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (path / f"{name}-{version}.dist-info" / "METADATA").write_text(text)

    @both
    def test_an_old_package(
        self,
        doctor: Doctor,
        variables: Callable[..., None],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.package(tmp_path, "aiohttp", "3.9.5")
        self.package(tmp_path, "langchain_core", "0.3")
        self.package(tmp_path, "llama_index_core", "0.15")
        monkeypatch.syspath_prepend(tmp_path)
        variables(KALM_BACKEND="local")
        shown = stopped_at("packages", doctor())
        assert "aiohttp 3.9.5 (needs >=3.12), langchain-core 0.3 (needs >=1.6)" in shown
        assert "llama-index-core 0.15 (needs <0.15,>=0.14.16)" in shown
        assert "→ pip install 'aiohttp>=3.12' 'langchain-core>=1.6' 'llama-index-core<" in shown

    def test_a_core_package_that_is_not_there(
        self, doctor: Doctor, variables: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        declared = ["no-such-thing>=1.5", "absent>=2; extra == 'modal'"]
        monkeypatch.setattr(machine, "requires", lambda _: declared)
        variables(KALM_BACKEND="local")
        shown = stopped_at("packages", doctor())
        assert shown == "no-such-thing is missing (needs >=1.5) → pip install 'no-such-thing>=1.5'"

    def test_a_package_that_does_not_import(self) -> None:
        code = (
            "import sys; sys.modules['aiohttp'] = None\n"
            "from kalm_integrations.cli import main; sys.exit(main(['doctor']))"
        )
        with Server() as server:
            done = subprocess.run(
                [sys.executable, "-W", "error", "-c", code],
                env=os.environ | SECRETS | {"KALM_BASE_URL": server.url},
                capture_output=True,
                text=True,
                check=False,
            )
        assert (done.returncode, done.stderr) == (1, "")
        assert re.search(r"✗ credentials +ModuleNotFoundError: .*aiohttp", done.stdout)
        assert "→ Install what is missing" in done.stdout
        assert "hunter2" not in done.stdout

    def test_a_misspelt_variable(self, doctor: Doctor, variables: Callable[..., None]) -> None:
        variables(KALM_BACKEND="local", KALM_TIMOUT="hunter2", KALM_DEPLOY_GPUS="L4", kalm_model="")
        variables(KALM_API_KEYS_FILE="keys.toml")
        diagnosis = doctor()
        assert diagnosis.status("variables", "settings") == ["warn", "ok"]
        shown = diagnosis.text("variables")
        assert "nothing reads KALM_DEPLOY_GPUS, KALM_TIMOUT" in shown
        assert "KALM_DEPLOY_GPU for KALM_DEPLOY_GPUS?" in shown
        assert "KALM_TIMEOUT for KALM_TIMOUT?" in shown
        assert diagnosis.summary == "All good, but look at: variables."

    def test_a_variable_that_cannot_work(
        self, doctor: Doctor, variables: Callable[..., None]
    ) -> None:
        variables(KALM_BACKEND="local", KALM_BATCH_SIZE="0", KALM_API_KEY="hunter2\x07")
        shown = stopped_at("settings", doctor(), "service")
        assert "batch_size (from KALM_BATCH_SIZE): " in shown
        assert "api_key (from KALM_API_KEY): it holds control characters" in shown
        assert "→ Correct the variables" in shown

    def test_no_service_is_configured(self, doctor: Doctor) -> None:
        diagnosis = doctor()
        assert "→ Set KALM_BASE_URL for a server" in stopped_at("settings", diagnosis, "service")
        assert "or set KALM_BACKEND=local" in diagnosis.summary

    def test_modals_client_is_not_there(
        self, doctor: Doctor, variables: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "modal", None)
        variables(KALM_BACKEND="modal", **SECRETS)
        after = (
            "app",
            "app version",
            "app identity",
            "class",
            "http endpoint",
            "container",
            *SERVICE,
        )
        shown = stopped_at("token", doctor(), *after)
        assert "Modal's client is missing" in shown
        assert re.search(r"→ pip install '.*\[modal\]'", shown)


class TestTheWayThere:
    after = ("health", "credentials", *SERVICE)

    def test_nobody_listens(self, doctor: Doctor, over: Callable[[str], None]) -> None:
        port = closed_port()
        over(f"http://127.0.0.1:{port}")
        shown = stopped_at("network", doctor(), *self.after)
        assert shown.startswith(
            f"nothing listens at 127.0.0.1:{port} → Check that the service runs"
        )

    def test_no_such_host(self, doctor: Doctor, over: Callable[[str], None]) -> None:
        over("http://kalm.invalid:8000")
        shown = stopped_at("network", doctor(), *self.after)
        assert shown.startswith("kalm.invalid:8000: ")

    def test_a_certificate_that_nobody_vouches_for(
        self, doctor: Doctor, over: Callable[[str], None], tmp_path: Path, variables: Callable
    ) -> None:
        authority = trustme.CA()
        mine = authority.issue_cert("127.0.0.1")
        with (
            mine.private_key_and_cert_chain_pem.tempfile() as both,
            authority.cert_pem.tempfile() as root,
            serving(_plain_app, ssl_certfile=both) as url,
        ):
            over(url)
            shown = stopped_at("network", doctor(), *self.after)
            assert "SSL_CERT_FILE" in shown
            variables(SSL_CERT_FILE=root)
            diagnosis = doctor()
        assert diagnosis.status("network", "health") == ["ok", "ok"]
        assert "valid certificate" in diagnosis.text("network")

    def test_no_tls_where_the_url_says_so(
        self,
        doctor: Doctor,
        over: Callable[[str], None],
        service: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(logging.getLogger("uvicorn.error"), "disabled", True)
        over(service.replace("http://", "https://"))
        shown = stopped_at("network", doctor(), *self.after)
        assert "does not speak TLS" in shown
        assert "→ If it is plain HTTP, write http:// in KALM_BASE_URL." in shown

    def test_tls_where_the_url_says_none(self, doctor: Doctor, over: Callable[[str], None]) -> None:
        mine = trustme.CA().issue_cert("127.0.0.1")
        with mine.private_key_and_cert_chain_pem.tempfile() as both:
            with serving(_plain_app, ssl_certfile=both) as url:
                over(url.replace("https://", "http://"))
                assert "GET http://" in stopped_at("health", doctor(), *self.after[1:])

    def test_a_proxy_that_is_not_there(
        self, doctor: Doctor, over: Callable[[str], None], variables: Callable[..., None]
    ) -> None:
        port = closed_port()
        variables(HTTP_PROXY=f"http://me:hunter2@127.0.0.1:{port}")
        over("http://somewmachine.invalid")
        shown = stopped_at("network", doctor(), *self.after)
        assert f"nothing listens at 127.0.0.1:{port}, the proxy of HTTP_PROXY" in shown

    def test_a_server_that_is_out_of_order(
        self, doctor: Doctor, over: Callable[[str], None]
    ) -> None:
        with Server(health=reply(503)) as server:
            over(server.url)
            shown = stopped_at("health", doctor(), *self.after[1:])
        assert "HTTP 503 → See the service's own log." in shown

    def test_a_server_without_that_route_is_fine(
        self, doctor: Doctor, over: Callable[[str], None]
    ) -> None:
        with Server(health=reply(404)) as server:
            over(f"{server.url}/v1/")
            diagnosis = doctor()
            assert diagnosis.status("health", "credentials", "identity") == ["ok"] * 3
            assert server.received[0].path == "/health"
            assert "authorization" not in server.received[0].headers


class TestTheService:
    after = SERVICE

    def test_a_wrong_key(
        self,
        doctor: Doctor,
        over: Callable[[str], None],
        variables: Callable[..., None],
        service: str,
    ) -> None:
        over(service)
        variables(KALM_API_KEY="hunter2-x")
        shown = stopped_at("credentials", doctor(), *self.after)
        assert "HTTP 401" in shown
        assert "→ Set KALM_API_KEY to the key that the service was started with" in shown

    @both
    def test_a_server_that_repeats_the_key_and_paints_the_terminal(
        self, doctor: Doctor, over: Callable[[str], None]
    ) -> None:
        said = f'{{"error": {{"message": "{SECRETS["KALM_API_KEY"]} \\u001b[31mis wrong"}}}}'
        with Server(models=reply(401, said)) as server:
            over(server.url)
            diagnosis = doctor()
        shown = stopped_at("credentials", diagnosis, *self.after)
        assert "*** [31mis wrong" in " ".join(shown.split())
        assert "\x1b" not in diagnosis.shown

    def test_another_server_is_a_warning(
        self, doctor: Doctor, over: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Server(ours=False) as server:
            over(server.url)
            diagnosis = doctor()
        assert diagnosis.status("credentials", "identity") == ["ok", "warn"]
        assert "reports no identity" in diagnosis.text("identity")

    def test_other_vectors_than_expected(
        self,
        doctor: Doctor,
        over: Callable[[str], None],
        variables: Callable[..., None],
        service: str,
    ) -> None:
        over(service)
        variables(KALM_MODEL="tencent/KaLM-Embedding-Gemma3-12B-2511")
        shown = stopped_at("identity", doctor(), "vectors", "latency")
        assert f"the service has {MODEL}" in shown
        assert f"set KALM_MODEL={MODEL};" in shown

    def test_another_revision_than_expected(
        self,
        doctor: Doctor,
        over: Callable[[str], None],
        variables: Callable[..., None],
        service: str,
    ) -> None:
        over(service)
        expected = replace(EMBEDDED.space, revision="another")
        variables(KALM_EXPECTED_IDENTITY=json.dumps(expected.to_dict()))
        shown = stopped_at("identity", doctor(), "vectors", "latency")
        assert "revision: 'another' != " in shown
        assert f"set KALM_EXPECTED_IDENTITY='{json.dumps(EMBEDDED.space.to_dict())}';" in shown

    def test_vectors_without_unit_length(self, doctor: Doctor, over: Callable[[str], None]) -> None:
        longer = packed(lambda answer: replace(answer, vectors=answer.vectors * 2))
        with Server([longer]) as server:
            over(server.url)
            shown = stopped_at("vectors", doctor(), "latency")
        assert "length 2.0" in shown
        assert "→ Do not store vectors of this service" in shown

    def test_vectors_that_mean_nothing(self, doctor: Doctor, over: Callable[[str], None]) -> None:
        mixed_up = packed(lambda answer: replace(answer, vectors=answer.vectors[[1, 0]]))
        reports = []
        for steps in ([], [None, mixed_up]):  # drawn by lot: one of them must be wrong
            with Server(steps) as server:
                over(server.url)
                reports.append(doctor())
        assert sorted(len(report.failed) for report in reports) == [0, 1]
        wrong = max(reports, key=lambda report: len(report.failed))
        shown = stopped_at("vectors", wrong, "latency")
        assert "question and answer" in shown
        assert "→ Do not store vectors of this service" in shown

    @pytest.mark.parametrize(
        ("codes", "status", "remedy"),
        [
            (["snapshot_without_engine"], "fail", "`kalm deploy` again"),
            (["restore_failed", "canary_failed"], "fail", "Store no vectors"),
            (["restore_failed"], "warn", "--snapshot off"),
            (["of_a_later_version"], "fail", "log"),
        ],
    )
    def test_a_service_that_warns(
        self,
        doctor: Doctor,
        over: Callable[[str], None],
        codes: list[str],
        status: str,
        remedy: str,
    ) -> None:
        service = EmbeddingService(embedded_engine())
        service.warnings = tuple(ServiceWarning(code, f"of {code}.") for code in codes)
        keys = BearerKeys([SecretStr(SECRETS["KALM_API_KEY"])])
        with serving(create_app(service, keys=keys)) as url:
            over(url)
            diagnosis = doctor()
        assert diagnosis.status("warnings") == [status]
        assert diagnosis.exit_status == (status == "fail")
        assert remedy in diagnosis.text("warnings")
        assert all(f"{code}: of {code}." in diagnosis.text("warnings") for code in codes)
        assert diagnosis.status("vectors", "latency") == ["ok", "ok"]

    def test_a_server_that_says_nothing(
        self, doctor: Doctor, over: Callable[[str], None], variables: Callable[..., None]
    ) -> None:
        with Server(models=stall) as server:
            over(server.url)
            variables(KALM_TIMEOUT="0.3")
            shown = stopped_at("credentials", doctor(), *self.after)
        assert "no response within timeout=0.3 s" in shown
        assert "Unset KALM_TIMEOUT" in shown


class Cutting(EmbeddingService):
    """Cuts vectors to the dimensions asked for."""

    async def embed(self, request: EmbedRequest, received: float | None = None) -> EmbedResponse:
        answer = await super().embed(request, received)
        cut = answer.vectors[:, : request.dimensions].astype(np.float32)
        cut /= np.linalg.norm(cut, axis=1, keepdims=True)
        return replace(answer, vectors=cut.astype(request.dtype))


class TestReference:
    """--reference: KaLM's reference texts, over the endpoint that an application uses."""

    @pytest.fixture
    def kalm(self, variables: Callable[..., None]) -> Iterator[Callable[..., KalmEngine]]:
        """Serves an engine that claims to be KaLM, and points the environment at it."""
        with ExitStack() as served:

            def kalm(spoil: Callable = lambda v: v, identity: SpaceIdentity = BF16) -> KalmEngine:
                engine = KalmEngine(spoil, identity)
                keys = BearerKeys([SecretStr(SECRETS["KALM_API_KEY"])])
                url = served.enter_context(serving(create_app(Cutting(engine), keys=keys)))
                expected = json.dumps(identity.to_dict())
                variables(KALM_BASE_URL=url, KALM_EXPECTED_IDENTITY=expected, **SECRETS)
                return engine

            yield kalm

    @pytest.mark.parametrize("identity", [BF16, FP8], ids=["bf16", "fp8"])
    def test_kalms_vectors(
        self, doctor: Doctor, kalm: Callable[..., KalmEngine], identity: SpaceIdentity
    ) -> None:
        kalm(identity=identity)
        diagnosis = doctor("--reference")
        assert list(diagnosis.found)[-5:] == [*SERVICE, "reference"]
        assert {status for status, _ in diagnosis.found.values()} == {"ok"}
        detail = diagnosis.text("reference")
        for check in ("order of 6 pairs", "12 published values", "6 published similarities"):
            assert check in detail
        for pair in reference.SIMILARITIES:
            assert f"{pair.cosine:.3f} ({pair.cosine:.3f})" in detail
        announced = diagnosis.errors if doctor.as_json else diagnosis.shown
        assert "waiting for the service" in announced

    def test_whatever_the_client_adds_and_cuts(
        self, doctor: Doctor, kalm: Callable[..., KalmEngine], variables: Callable[..., None]
    ) -> None:
        engine = kalm()
        variables(KALM_DIMENSIONS="64", KALM_DOCUMENT_INSTRUCTION="sts", KALM_BATCH_SIZE="5")
        diagnosis = doctor("--reference")
        assert diagnosis.status("vectors", "reference") == ["ok", "ok"]
        assert "64 dimensions" in diagnosis.text("vectors")
        asked = [text for texts, _ in engine.asked[-4:] for text in texts]
        assert tuple(asked) == reference.TEXTS

    @pytest.mark.parametrize(
        ("spoil", "found"),
        [
            (lambda v: v[:, ::-1], "published values: "),
            (lambda v: v[:-1], "(17, 3840)"),
        ],
        ids=["values", "one too few"],
    )
    @pytest.mark.usefixtures("quick_retries")
    def test_vectors_that_are_not_kalms(
        self, doctor: Doctor, kalm: Callable[..., KalmEngine], spoil: Callable, found: str
    ) -> None:
        kalm(lambda vectors: spoil(vectors) if len(vectors) == len(reference.TEXTS) else vectors)
        shown = stopped_at("reference", doctor("--reference"))
        assert found in shown
        assert "→ Do not store vectors of this service" in shown

    def test_another_model_is_not_judged(
        self, doctor: Doctor, over: Callable[[str], None], service: str
    ) -> None:
        over(service)
        diagnosis = doctor("--reference")
        assert diagnosis.exit_status == 0
        assert diagnosis.status("latency", "reference") == ["ok", "skipped"]
        assert f"no reference vectors of {MODEL}" in diagnosis.text("reference")

    def test_a_service_that_lets_nobody_in(
        self, doctor: Doctor, kalm: Callable[..., KalmEngine], variables: Callable[..., None]
    ) -> None:
        kalm()
        variables(KALM_API_KEY="hunter2-x")
        stopped_at("credentials", doctor("--reference"), *SERVICE, "reference")

    def test_the_option_had_another_name(
        self, doctor: Doctor, kalm: Callable[..., KalmEngine]
    ) -> None:
        kalm()
        assert "reference" in doctor("--golden").found

    @pytest.mark.parametrize("asked", [(), ("--wake",)], ids=["", "--wake"])
    def test_only_when_asked_for(
        self, doctor: Doctor, kalm: Callable[..., KalmEngine], asked: tuple[str, ...]
    ) -> None:
        engine = kalm()
        diagnosis = doctor(*asked)
        assert "reference" not in diagnosis.found
        assert not {text for texts, _ in engine.asked for text in texts} & set(reference.TEXTS[1:])

    def test_it_wakes(
        self,
        doctor: Doctor,
        kalm: Callable[..., KalmEngine],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(over_http, "MODAL", "127.0.0.1")
        kalm()
        assert set(doctor().status(*SERVICE)) == {"skipped"}
        diagnosis = doctor("--reference")
        assert set(diagnosis.status(*SERVICE, "reference")) == {"ok"}
        assert json.loads(diagnosis.shown)["wake"] is True

    @pytest.mark.parametrize(
        ("spoil", "status", "said"),
        [
            (lambda v: v, "ok", "12 published values"),
            (
                lambda v: np.vstack([v[:-4], similar(1, 0.03)]),
                "warn",
                "If the service computes in bf16, which it does not",
            ),
        ],
        ids=[
            "right",
            "a similarity outside the tolerance of bf16",
        ],
    )
    def test_a_server_that_does_not_say_what_it_computes_in(
        self,
        doctor: Doctor,
        variables: Callable[..., None],
        spoil: Callable,
        status: str,
        said: str,
    ) -> None:
        """Such as a stock `vllm serve`."""
        models = reply(200, json.dumps({"data": [{"id": BF16.model}]}))
        answer = openai_answer(spoil)
        with Server(repeat(answer), models=models, short_text=answer) as server:
            variables(KALM_BASE_URL=server.url)
            diagnosis = doctor("--reference")
        assert diagnosis.status("identity", "vectors", "reference") == ["warn", "ok", status]
        assert said in diagnosis.text("reference")


def openai_answer(spoil: Callable) -> Step:
    """KaLM's vectors, those of the reference texts spoilt, from a server that is not ours."""

    async def step(request: Received, writer: asyncio.StreamWriter) -> None:
        vectors = KalmEngine().right(request.texts)
        if len(vectors) == len(reference.TEXTS):
            vectors = spoil(vectors)
        rows = [{"index": i, "embedding": row.tolist()} for i, row in enumerate(vectors)]
        content = {"model": BF16.model, "data": rows, "usage": {"prompt_tokens": 1}}
        await reply(200, json.dumps(content))(request, writer)

    return step


class TestCold:
    """A service that scales to zero is paid for each request."""

    def test_no_request_before_it_is_told_to(
        self, doctor: Doctor, over: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(over_http, "MODAL", "127.0.0.1")
        with Server() as server:
            over(server.url)
            diagnosis = doctor()
            assert server.received == []
            assert diagnosis.exit_status == 0
            assert diagnosis.status("keys", "network", "credentials") == ["ok", "ok", "skipped"]
            assert "--wake does it" in diagnosis.text("credentials")
            assert set(diagnosis.status(*SERVICE)) == {"skipped"}
            assert "No container was started" in diagnosis.summary
            awake = doctor("--wake")
            assert awake.status("credentials", "identity") == ["ok", "ok"]
            assert {request.path for request in server.received} == {"/v1/models", "/v1/embeddings"}

    def test_a_first_start_is_waited_for_unless_somebody_chose_a_time(self) -> None:
        for arguments, wake, on_modal, limit in (
            ({}, True, True, 1800),
            ({"timeout": 60}, True, True, 60),
            ({"timeout": 3000}, True, True, 3000),
            ({}, True, False, 600),
            ({}, False, True, 10),
        ):
            settings = ClientConfig(backend="modal", **arguments)
            assert DoctorContext(wake=wake, config=settings, scales_to_zero=on_modal).limit == limit

    def test_an_address_of_modals_is_one(self) -> None:
        for url, cold in {
            "https://me--app-class-http.modal.run": True,
            "https://modal.run.example": False,
            "https://not-modal.run": False,
            "https://me.modal.run.example": False,
        }.items():
            context = DoctorContext(wake=False, config=ClientConfig(base_url=url))
            over_http.checks(context)
            assert context.scales_to_zero == cold

    def test_no_key_at_all(
        self, doctor: Doctor, variables: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(over_http, "MODAL", "127.0.0.1")
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            variables(KALM_BASE_URL=f"http://127.0.0.1:{port}", KALM_MODEL=MODEL)
            diagnosis = doctor()
        assert diagnosis.status("keys", "network") == ["warn", "ok"]
        assert "→ Set KALM_API_KEY" in diagnosis.text("keys")


class TestTheReport:
    def test_wrong_usage(self) -> None:
        assert main(["doctor", "--fast"]) == 2

    def test_secrets_are_redacted(self, variables: Callable[..., None]) -> None:
        tokens = {"MODAL_TOKEN_ID": "hunter2-i", "MODAL_TOKEN_SECRET": "hunter2-i-and-more"}
        variables(**SECRETS, **tokens)
        for value in (*SECRETS.values(), *tokens.values()):
            assert base.redact(f"no {value}!") == "no ***!"

    @pytest.mark.parametrize("secret", ["local", "8000", "secret", "a-b", "...", "----------"])
    def test_a_secret_that_is_an_ordinary_word_eats_no_words(
        self, variables: Callable[..., None], secret: str
    ) -> None:
        variables(KALM_API_KEY=secret)
        text = f"backend={secret} at localhost:8000, a-b ... ----------"
        assert base.redact(text) == text

    def test_such_a_secret_is_reported(
        self, doctor: Doctor, variables: Callable[..., None]
    ) -> None:
        variables(KALM_BASE_URL="http://127.0.0.1:1", KALM_API_KEY="local")
        assert "not redacted" in doctor().text("settings")

    def test_a_check_that_takes_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(base, "LIMIT", -0.9)
        check = Check("slow", lambda _: time.sleep(30), no_answer="Wait.")  # type: ignore[arg-type, return-value]
        found = base.run_check(check, DoctorContext(wake=False))
        assert (found.name, found.status, found.remedy) == ("slow", "fail", "Wait.")
        assert found.seconds < 10

    def test_what_nobody_foresaw_is_a_failure_too(self) -> None:
        def broken(_: DoctorContext) -> Finding:
            raise RuntimeError("of our own")

        found = base.run_check(Check("broken", broken), DoctorContext(wake=False))
        assert (found.status, found.detail) == ("fail", "RuntimeError: of our own")
        assert "report it" in found.remedy

    def test_every_error_has_a_remedy(self) -> None:
        for kind in subclasses(KalmError)[1:]:
            found = base._failure(kind("what happened."), Check("x", machine.python))
            assert found.detail == "what happened."
            assert found.remedy

    def test_log_lines_do_not_mix_with_it(self) -> None:
        with Server(ours=False) as server:
            done = subprocess.run(
                [sys.executable, "-m", "kalm_integrations.cli", "doctor"],
                env=os.environ | {"KALM_BASE_URL": server.url, "KALM_MODEL": MODEL},
                capture_output=True,
                text=True,
                check=False,
            )
        assert "reports no identity" in done.stdout  # for which the client logs a warning
        assert done.stderr == ""

    def test_a_terminal_without_check_marks(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "kalm_integrations.cli", "doctor"],
            env=os.environ | {"KALM_BATCH_SIZE": "0", "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            check=False,
        )
        shown = done.stdout.decode("ascii")
        assert done.returncode == 1
        assert "+ python" in shown
        assert "X settings" in shown
        assert "> Correct" in shown


async def _plain_app(scope: dict, receive: object, send: Callable) -> None:
    """Answers everything, and says nothing."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})
