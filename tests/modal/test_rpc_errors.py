"""The RPC transport: each way for it to fail, caused in the real client and runtime, and what the
user reads then; retries, deadlines, lost containers, processes; no blobs.

The emulated cloud answers as Modal's documentation and client let expect: its wording, and when it
gives up on a container that cannot start, are the emulator's own.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import modal
import numpy as np
import pytest
from grpclib import GRPCError, Status
from modal_emulator import Emulator

from kalm_integrations import KalmClient, cli
from kalm_integrations.errors import (
    ConnectionFailedError,
    ContainerFailedError,
    CorruptedAnswerError,
    DeadlineExceededError,
    IdentityMismatchError,
    InvalidResponseError,
    KalmError,
    ModalTokenError,
    NotDeployedError,
    RateLimitError,
    TransportError,
)
from kalm_integrations.models import EMBEDDED

ROOT = Path(__file__).parents[2]
MISFITS = Path(__file__).parent / "apps" / "misfits.py"
APP, CLASS = "vllm-embedding-snapshot", "VLLMEmbeddingSnapshot"
MODEL = EMBEDDED.space.model
TOKEN = ("ak-4711-known", "as-0815-hidden")
SECRETS = (TOKEN[1], "as-0815-wrong")
TEXTS = [f"Fact number {i} is about K{i}." for i in range(200)]


@pytest.fixture(scope="module")
def emulator(new_emulator: Callable[..., Emulator]) -> Iterator[Emulator]:
    emulator = new_emulator(
        credentials=TOKEN, crash_backoff=(0.05, 0.1), crashes_until_escalation=1
    )
    emulator.deploy("modal_backend.app", cwd=ROOT, env={"KALM_DEPLOY_ENGINE": "embedded"})
    emulator.deploy(MISFITS)
    yield emulator
    assert not emulator.unimplemented


@pytest.fixture(autouse=True)
def environment(modal_env: Emulator, quick_retries: None) -> None:
    """This process's variables point at the emulator."""


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    with KalmClient(backend="local", vector_dtype="float32") as local:
        return local.embed(TEXTS).vectors


def client(**settings: Any) -> KalmClient:
    defaults = {"backend": "modal", "model": MODEL, "vector_dtype": "float32", "timeout": 60}
    return KalmClient(**{**defaults, **settings})


def misfit(class_name: str, **settings: Any) -> KalmClient:
    return client(app_name="misfits", class_name=class_name, **settings)


def sent(emulator: Emulator, *names: str) -> int:
    """How many requests of these RPCs came from clients."""
    requests = emulator.cloud.recorder.requests
    return sum(r.sender == "client" and r.name in names for r in requests)


def no_token(_: Emulator, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("MODAL_TOKEN_ID")
    patch.delenv("MODAL_TOKEN_SECRET")
    modal.Client._set_env_client(None)


def wrong_token(_: Emulator, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("MODAL_TOKEN_SECRET", SECRETS[1])
    modal.Client._set_env_client(None)


def rate_limit(emulator: Emulator, _: pytest.MonkeyPatch) -> None:
    emulator.inject("FunctionMap", GRPCError(Status.RESOURCE_EXHAUSTED, "200 a second"), times=9)


# -- the rows ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Row:
    """What is wrong, and what is made of it; the last of `says` is what to do. `calls` and `starts`
    are what it costs."""

    name: str
    error: type[KalmError]
    says: tuple[str, ...]
    cause: Callable[[Emulator, pytest.MonkeyPatch], None] = lambda *_: None
    settings: dict[str, Any] = field(default_factory=dict)
    calls: int = 0
    starts: int = 0


ROWS = [
    Row(
        "no token",
        ModalTokenError,
        ("Token missing", "Run `modal setup`"),
        no_token,
    ),
    Row(
        "wrong token",
        ModalTokenError,
        ("Token validation failed", "Run `modal setup`"),
        wrong_token,
    ),
    Row(
        "app not deployed",
        NotDeployedError,
        ("Modal app 'absent', class", "app_name=", "Run `kalm deploy`"),
        settings={"app_name": "absent"},
    ),
    Row(
        "deployed in another environment",
        NotDeployedError,
        (f"Modal app {APP!r} in environment 'dev'", "environment_name=", "Run `kalm deploy`"),
        settings={"environment_name": "dev"},
    ),
    Row(
        "class missing",
        NotDeployedError,
        ("class 'Absent'", "class_name=", "Run `kalm deploy`"),
        settings={"class_name": "Absent"},
    ),
    Row(
        "deployment without the packed method",
        NotDeployedError,
        ("class 'Older'", "no method embed_packed", "Run `kalm deploy`"),
        settings={"app_name": "misfits", "class_name": "Older"},
    ),
    Row(
        "container failed to start",
        ContainerFailedError,
        ("class 'CannotStart' failed: OSError: libcuda.so.1", "`modal app logs APP"),
        settings={"app_name": "misfits", "class_name": "CannotStart"},
        calls=2,  # each start is paid: once more, and no oftener
        starts=2,
    ),
    Row(
        "function timeout",
        DeadlineExceededError,
        ("hit its timeout of 1s", "`kalm deploy --timeout`"),
        settings={"app_name": "misfits", "class_name": "TooSlow"},
        calls=1,
        starts=1,
    ),
    Row(
        "identity mismatch",
        IdentityMismatchError,
        (f"but the service has {MODEL}", "expected_identity="),
        settings={"model": None},  # KaLM's
        calls=1,
    ),
    Row(
        "workspace rate limit",
        RateLimitError,
        ("Modal's limit for the workspace", "200 a second", "Lower max_concurrency"),
        rate_limit,
        settings={"max_retries": 3},
        calls=4,
    ),
]


TOKENS = ROWS[:2]


@pytest.fixture
def caused(
    request: pytest.FixtureRequest, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Row]:
    row: Row = request.param
    if row.settings.get("app_name", APP) == APP:
        client().warm_up()  # no row measures this start
    row.cause(emulator, monkeypatch)
    yield row
    emulator.cloud.recorder.faults.clear()


@pytest.mark.parametrize("caused", ROWS, indirect=True, ids=lambda row: row.name)
def test_what_the_user_reads(
    caused: Row, emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    def cost() -> tuple[int, int]:
        pools = list(emulator.cloud.pools.values())
        return sent(emulator, "FunctionMap"), sum(len(pool.history) for pool in pools)

    calls, starts = cost()
    # Of these loggers: the client's HTTP/2 library writes all headers to its own, at DEBUG.
    for logger in ("kalm_integrations", "modal"):
        caplog.set_level(logging.DEBUG, logger)
    with pytest.raises(KalmError) as caught:
        client(**caused.settings).embed(["a"])
    assert type(caught.value) is caused.error, repr(caught.value)
    for said in caused.says:
        assert said in str(caught.value)
    assert cost() == (calls + caused.calls, starts + caused.starts)
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert not any(secret in told for secret in SECRETS)


@pytest.mark.parametrize("caused", TOKENS, indirect=True, ids=lambda row: row.name)
def test_what_a_deployment_says(caused: Row, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["deploy", "--engine", "embedded"]) == 1
    shown = capsys.readouterr()
    assert shown.out.endswith("Asking Modal what is deployed\n")
    assert shown.err.startswith("kalm deploy: ")
    assert caused.says[-1] in shown.err
    assert not any(secret in shown.err for secret in SECRETS)


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        ("5", InvalidResponseError, "embed_packed returned int"),
        ("{}", InvalidResponseError, "has no packed vectors"),
        ("{'packed': 'text'}", InvalidResponseError, "has no packed vectors"),
        ("{'packed': b'short'}", CorruptedAnswerError, "not packed vectors"),
        ("{'error': {'code': 'of a later version', 'message': 'm.'}}", TransportError, "m."),
        ("1 / 0", ContainerFailedError, "ZeroDivisionError"),
    ],
)
def test_an_answer_that_is_none(answer: str, error: type[KalmError], said: str) -> None:
    with pytest.raises(KalmError, match=said) as caught:
        misfit("Strange").embed([answer])
    assert type(caught.value) is error


def test_a_service_that_does_not_say_who_it_is() -> None:
    with pytest.raises(InvalidResponseError, match="describe returned no identity"):
        misfit("Strange").warm_up()


# -- what is tried again -----------------------------------------------------------------------
def test_rate_limits_pass(emulator: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    """Modal's client does not retry them."""
    caplog.set_level("DEBUG", logger="kalm_integrations.session")
    emulator.inject("FunctionMap", GRPCError(Status.RESOURCE_EXHAUSTED, "too fast"), times=3)
    assert len(client().embed(["a"])) == 1
    assert caplog.text.count("retry ") == 3


def test_a_broken_connection_is_left_to_modals_client(
    emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="kalm_integrations.session")
    emulator.inject("FunctionMap", GRPCError(Status.UNAVAILABLE, "blip"), times=3)
    assert len(client().embed(["a"])) == 1
    assert "retry " not in caplog.text


def test_what_it_gives_up_is_tried_again(
    emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="kalm_integrations.session")
    emulator.inject("FunctionMap", GRPCError(Status.UNAVAILABLE, "down"), times=4)
    assert len(client().embed(["a"])) == 1
    assert caplog.text.count("retry ") == 1


def test_a_container_killed_with_the_call_in_it(emulator: Emulator, expected: np.ndarray) -> None:
    """When all is computed and nothing sent: the call runs again, in another container."""
    made = client(batch_size=len(TEXTS))
    made.warm_up()
    (running,) = emulator.running(f"{APP}/{CLASS}")
    starts, calls = emulator.starts(f"{APP}/{CLASS}"), sent(emulator, "FunctionMap")
    emulator.inject("FunctionPutOutputs", lambda _: running.kill())
    assert np.allclose(made.embed(TEXTS).vectors, expected, atol=1e-6)
    assert emulator.starts(f"{APP}/{CLASS}") == starts + 1
    assert sent(emulator, "FunctionMap") == calls + 1
    assert running.gone.is_set()


def test_modal_out_of_reach_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left alone, Modal's client tries to connect for a minute, each time."""
    monkeypatch.setenv("MODAL_SERVER_URL", "http://127.0.0.1:1")
    modal.Client._set_env_client(None)
    began = time.monotonic()
    with pytest.raises(ConnectionFailedError, match=r"within connect_timeout=0\.3 s"):
        client(connect_timeout=0.3, max_retries=1).embed(["a"])
    assert 0.6 < time.monotonic() - began < 50


# -- lookups -----------------------------------------------------------------------------------
def test_the_class_is_looked_up_once(emulator: Emulator) -> None:
    made = client()
    made.embed(["a"])
    before = sent(emulator, "ClassGet", "FunctionGet")
    for text in TEXTS[:5]:
        made.embed([text])
    assert sent(emulator, "ClassGet", "FunctionGet") == before


def test_what_was_deployed_anew_is_looked_up_again(emulator: Emulator) -> None:
    """A stopped app that is deployed again has other ids."""
    made = client()
    made.embed(["a"])
    emulator.inject("FunctionMap", GRPCError(Status.NOT_FOUND, "No function fu-gone"))
    assert len(made.embed(["b"])) == 1


def test_what_is_gone_is_looked_up_again_once(emulator: Emulator) -> None:
    made = client()
    made.embed(["a"])
    before = sent(emulator, "FunctionMap")
    emulator.inject("FunctionMap", GRPCError(Status.NOT_FOUND, "No function fu-gone"), times=5)
    with pytest.raises(NotDeployedError):
        made.embed(["b"])
    emulator.cloud.recorder.faults.clear()
    assert sent(emulator, "FunctionMap") == before + 2


def test_a_lookup_that_failed_can_be_closed() -> None:
    made = client(backend="http", app_name="absent")
    for _ in range(2):
        with pytest.raises(NotDeployedError):
            made.embed(["a"])
    made.close()


# -- deadlines ---------------------------------------------------------------------------------
def test_the_deadline_travels_with_the_request(emulator: Emulator) -> None:
    client(timeout=30).embed(["a"])
    *_, request = (r for r in emulator.cloud.recorder.requests if r.name == "FunctionMap")
    ((fields,), _) = pickle.loads(request.message.pipelined_inputs[0].input.args)
    assert 0 < fields["timeout"] < 30


def test_a_deadline_that_passes_while_a_container_starts(emulator: Emulator) -> None:
    client().warm_up()
    emulator.kill(f"{APP}/{CLASS}")
    starts, calls = emulator.starts(f"{APP}/{CLASS}"), sent(emulator, "FunctionMap")
    with emulator.holding_restores():
        began = time.monotonic()
        with pytest.raises(DeadlineExceededError, match=r"timeout=2 s.*warm_up\(\)"):
            client(timeout=2).embed(["a"])
        assert time.monotonic() - began < 60
        time.sleep(0.3)
        assert sent(emulator, "FunctionMap") == calls + 1
    assert len(client().embed(["b"])) == 1  # in the container that was started for the first
    assert emulator.starts(f"{APP}/{CLASS}") == starts + 1


# -- threads, loops, processes -----------------------------------------------------------------
def test_many_threads_make_their_first_call_together(
    emulator: Emulator, expected: np.ndarray
) -> None:
    made = client(batch_size=5)
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: made.embed(TEXTS[:40]).vectors, range(8)))
    assert all(np.allclose(answer, expected[:40], atol=1e-6) for answer in answers)


PROGRAM = f"""
import asyncio, gc, os, time
from kalm_integrations import KalmClient

client = KalmClient(backend="modal", model={MODEL!r})
assert client.embed(["a"]).vectors.shape == (1, 512)
for text in "bc":
    assert len(asyncio.run(client.aembed([text]))) == 1
for text in "de":
    child = os.fork()
    if not child:
        assert len(client.embed([text])) == len(asyncio.run(client.aembed([text]))) == 1
        gc.collect()
        os._exit(0)  # as multiprocessing ends its workers
    assert os.waitpid(child, 0)[1] == 0
    began = time.monotonic()
    assert len(client.embed([text])) == 1
    assert time.monotonic() - began < 35  # Modal's client takes 40 s to miss a connection
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_loops_and_forks(emulator: Emulator) -> None:
    client().warm_up()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- two megabytes -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("texts", "settings", "requests"),
    [
        (1000, {"vector_dtype": "float16"}, 8),
        (1100, {"batch_size": 2048}, 2),  # 2.15 MiB of vectors
    ],
)
def test_a_thousand_texts_take_no_blob(
    emulator: Emulator, texts: int, settings: dict[str, Any], requests: int
) -> None:
    made = client(**settings)
    made.warm_up()
    before, calls = dict(emulator.cloud.blobs.stats), sent(emulator, "FunctionMap")
    assert len(made.embed(map(str, range(texts)))) == texts
    assert dict(emulator.cloud.blobs.stats) == before
    assert sent(emulator, "FunctionMap") == calls + requests
    assert sent(emulator, "BlobCreate") == 0


def test_without_that_plan_it_would_take_one(emulator: Emulator) -> None:
    """The emulator counts blobs at all."""
    service = modal.Cls.from_name(APP, CLASS)()
    request = {"texts": list(map(str, range(1100))), "role": "document", "dtype": "float32"}
    before = emulator.cloud.blobs.stats["puts"]
    assert len(service.embed_packed.remote(request)["packed"]) > 2 * 2**20
    assert emulator.cloud.blobs.stats["puts"] == before + 1
