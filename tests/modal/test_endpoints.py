"""RPC and HTTP of one deployment: vectors, credentials, and losses on the way.

The Modal client, the container's runtime and the app are real; the cloud between them is emulated.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from modal_emulator import Emulator

from kalm_integrations import KalmClient, KalmModalEmbeddings
from kalm_integrations.cli import main
from kalm_integrations.errors import AuthenticationError, KalmError
from kalm_integrations.llama_index import KalmModalEmbeddings as LlamaIndexEmbeddings
from kalm_integrations.models import EMBEDDED

ROOT = Path(__file__).parents[2]
CLASS = "VLLMEmbeddingSnapshot"
MODEL = EMBEDDED.space.model
PROXY = {"modal_key": "wk-emulated", "modal_secret": "ws-emulated"}
local = KalmClient(backend="local")
TEXTS = [f"Fact number {i} is about K{i}." for i in range(300)]


@pytest.fixture(scope="module")
def deploy(emulator: Emulator) -> Callable[..., None]:
    def deploy(**settings: str) -> None:
        variables = {f"KALM_DEPLOY_{name.upper()}": value for name, value in settings.items()}
        variables["KALM_DEPLOY_ENGINE"] = "embedded"
        emulator.deploy("modal_backend.app", cwd=ROOT, env=variables)

    deploy()
    return deploy


@pytest.fixture
def service(deploy: Any, modal_env: Emulator) -> Iterator[Emulator]:
    """The deployed app, with this process's variables pointing at it."""
    return modal_env


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return KalmClient(backend="local").embed(TEXTS).vectors


def client(backend: str = "modal", **settings: Any) -> KalmClient:
    return KalmClient(**{"backend": backend, "model": MODEL, **PROXY, **settings})


class TestRpcAndHttp:
    @pytest.mark.parametrize("backend", ["modal", "http"])
    def test_sync_and_async_calls_return_all_vectors(
        self, service: Emulator, backend: str, expected: np.ndarray
    ) -> None:
        with client(backend, batch_size=64) as kalm:
            assert np.allclose(kalm.embed(TEXTS).vectors, expected, atol=1e-3)
            assert kalm.warm_up().space == EMBEDDED.space
            assert kalm.count_tokens(TEXTS[:3]) == local.count_tokens(TEXTS[:3])
            asynchronous = asyncio.run(kalm.aembed(TEXTS[:3]))
            assert np.allclose(asynchronous.vectors, expected[:3], atol=1e-3)
            again = asyncio.run(kalm.aembed(TEXTS[3:6]))  # in a second loop
            assert np.allclose(again.vectors, expected[3:6], atol=1e-3)
        assert not service.unimplemented

    def test_gevent_may_patch_anything_but_threads(self, service: Emulator) -> None:
        program = f"""
from gevent import monkey; monkey.patch_all(thread=False)
import gevent
from kalm_integrations import KalmClient
client = KalmClient(backend="modal", model={MODEL!r}, timeout=60)
jobs = [gevent.spawn(client.embed, [f"text {{i}}"]) for i in range(5)]
gevent.joinall(jobs)
print([job.get().vectors.shape for job in jobs] == [(1, 512)] * 5)"""
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | service.client_env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.stdout == "True\n", done.stderr

    def test_adapters_return_the_vectors(self, service: Emulator, expected: np.ndarray) -> None:
        arguments: dict[str, Any] = {"model": MODEL, "class_name": CLASS, **PROXY}
        lang_chain = KalmModalEmbeddings(backend="modal", **arguments)
        llama_index = LlamaIndexEmbeddings(backend="http", **arguments)
        for embed in (lang_chain.embed_documents, llama_index.get_text_embedding_batch):
            assert np.allclose(embed(TEXTS[:2]), expected[:2], atol=1e-3)

    def test_variables_alone_configure_another_process(
        self, service: Emulator, expected: np.ndarray
    ) -> None:
        code = (
            "import json\n"
            "from kalm_integrations import KalmModalEmbeddings\n"
            f"print(json.dumps(KalmModalEmbeddings().embed_documents({TEXTS[:2]})))\n"
        )
        variables = {"KALM_MODEL": MODEL}  # "auto" finds the Modal token
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **service.client_env, **variables},
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert np.allclose(json.loads(done.stdout), expected[:2], atol=1e-3)

    def test_rpc_and_http_share_one_container(self, service: Emulator) -> None:
        with ThreadPoolExecutor(8) as pool:
            clients = [client(backend) for backend in ("modal", "http") for _ in range(4)]
            results = list(pool.map(lambda one: one.embed(TEXTS[:64]).vectors, clients))
        assert all(np.array_equal(result, results[0]) for result in results)
        assert len(service.running(CLASS)) == 1


class TestHttp:
    def test_requests_without_a_proxy_token_start_no_container(
        self, deploy: Any, modal_env: Emulator
    ) -> None:
        deploy(app_name="unvisited")
        for wrong in (
            {"modal_key": None, "modal_secret": None},
            {"modal_key": "wk-emulated", "modal_secret": "ws-wrong"},
        ):
            with pytest.raises(AuthenticationError, match="modal_key= and modal_secret="):
                client("http", app_name="unvisited", **wrong).embed(["x"])
        assert modal_env.starts(f"unvisited/{CLASS}") == 0

    def test_the_openai_client_gets_the_vectors(
        self, service: Emulator, expected: np.ndarray
    ) -> None:
        made = openai.OpenAI(
            base_url=service.web_url(CLASS, "http") + "/v1",
            api_key="not asked for",
            default_headers={"Modal-Key": "wk-emulated", "Modal-Secret": "ws-emulated"},
        )
        with made:
            answer = made.embeddings.create(model=MODEL, input=TEXTS[:5])
        assert np.allclose([row.embedding for row in answer.data], expected[:5], atol=1e-3)

    def test_proxy_and_bearer_requires_both(self, deploy: Any, modal_env: Emulator) -> None:
        modal_env.set_secret("kalm-api-key", {"KALM_API_KEY": "old-key new-key"})
        deploy(app_name="guarded", auth="proxy+bearer")
        for key in ("old-key", "new-key"):
            made = client("http", app_name="guarded", api_key=key)
            assert made.embed(["x"]).vectors.shape == (1, 512)
        with pytest.raises(AuthenticationError, match="bearer key is missing or wrong"):
            client("http", app_name="guarded").embed(["x"])
        modal_env.stop_app("guarded")

    def test_bearer_public_requires_only_the_key(self, deploy: Any, modal_env: Emulator) -> None:
        modal_env.set_secret("kalm-api-key", {"KALM_API_KEY": "the-key"})
        deploy(app_name="public", auth="bearer-public")
        alone = {"modal_key": None, "modal_secret": None, "app_name": "public"}
        assert len(client("http", api_key="the-key", **alone).embed(["x"])) == 1
        with pytest.raises(AuthenticationError):
            client("http", api_key="another", **alone).embed(["x"])
        modal_env.stop_app("public")

    def test_redirects_of_slow_responses_are_followed(
        self, service: Emulator, expected: np.ndarray
    ) -> None:
        slow = [f"{text} {'again and ' * 300}" for text in TEXTS[:10]]
        with service.changed(web_redirect_after=0.1):
            got = client("http", batch_size=11).embed([*slow, TEXTS[0]]).vectors
        assert np.allclose(got[-1], expected[0], atol=1e-3)

    @pytest.mark.parametrize("status", [429, 503])
    def test_refusals_of_modals_proxy_are_retried_within_the_deadline(
        self, service: Emulator, status: int
    ) -> None:
        service.refuse_web(status, times=2, headers={"Retry-After": "0"})
        assert len(client("http").embed(["x"])) == 1
        service.refuse_web(status, times=2, headers={"Retry-After": "60"})  # also of models
        with pytest.raises(KalmError, match=str(status)):
            client("http", timeout=2).embed(["x"])

    def test_http_callers_do_not_block_rpc(self, deploy: Any, modal_env: Emulator) -> None:
        """Even if they use all of their share of the concurrency."""
        deploy(app_name="busy", concurrency="8")
        rpc = client(app_name="busy")
        rpc.warm_up()
        stop = threading.Event()
        slow = [f"{i} {'word ' * 500}" for i in range(16)]

        def hammer() -> None:
            made = client("http", app_name="busy", batch_size=1, max_retries=100)
            while not stop.is_set():
                made.embed(slow)

        threads = [threading.Thread(target=hammer) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            time.sleep(1)  # until all are busy
            durations = []
            for i in range(3):
                start = time.monotonic()
                rpc.embed([f"query {i}"], role="query")
                durations.append(time.monotonic() - start)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        # Alone, an HTTP call of this load takes seconds; a queue of them would take minutes.
        assert max(durations) < 60
        modal_env.stop_app("busy")


class TestLosses:
    def test_a_container_killed_during_http_calls_loses_no_vectors(
        self, deploy: Any, modal_env: Emulator, expected: np.ndarray
    ) -> None:
        """test_rpc_errors.py shows the same over RPC."""
        deploy(app_name="killed")
        made = client("http", app_name="killed", batch_size=4, max_concurrency=8)
        made.warm_up()
        killer = threading.Timer(0.3, modal_env.kill, [f"killed/{CLASS}"])
        killer.start()
        got = made.embed([*TEXTS, *(f"{text} {'x' * 2000}" for text in TEXTS[:60])]).vectors
        killer.join()
        assert np.allclose(got[:300], expected, atol=1e-3)
        assert modal_env.starts(f"killed/{CLASS}") == 2
        modal_env.stop_app("killed")

    @pytest.mark.parametrize("backend", ["modal", "http"])
    def test_a_redeployment_during_a_call_loses_no_vectors(
        self, deploy: Any, modal_env: Emulator, backend: str, expected: np.ndarray
    ) -> None:
        deploy(app_name="rolled")
        made = client(backend, app_name="rolled", batch_size=8)
        made.warm_up()
        going = ThreadPoolExecutor(1).submit(lambda: [made.embed(TEXTS).vectors for _ in range(2)])
        deploy(app_name="rolled", max_containers="2")
        for got in going.result(timeout=60):
            assert np.allclose(got, expected, atol=1e-3)
        modal_env.stop_app("rolled")


def test_eval_compares_two_apps_by_name(
    deploy: Any,
    service: Emulator,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    deploy(app_name="another")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXTS[:40]))
    apps = ["vllm-embedding-snapshot", "another"]
    assert main(["eval", "compare", *apps, "--corpus", str(corpus), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert [document[side]["name"] for side in ("baseline", "candidate")] == apps
    assert document["baseline"]["identity"] == EMBEDDED.space.to_dict()
    assert document["figures"]["overlap@1"]["lowest"] == 1
    assert main(["eval", "compare", apps[0], "missing", "--corpus", str(corpus)]) == 1
    assert "missing: " in capfd.readouterr().err
