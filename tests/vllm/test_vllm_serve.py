"""`kalm serve --engine vllm`, as a user starts it: real vLLM, real clients, real signals."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from kalm_served import KEY, LOADING, Serving, end, gone
from reference import cosines, reference_vectors, token_ids
from texts import many
from tiny_models import tiny_gemma3

from kalm_integrations import KalmClient
from kalm_integrations.langchain import KalmModalEmbeddings as ForLangChain
from kalm_integrations.llama_index import KalmModalEmbeddings as ForLlamaIndex

NAME = "tiny-gemma"
HANGS = 120
"""Seconds after which a wait has hung; no measure of how long something takes."""
TEXTS = many(40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gemma3(tmp_path_factory.mktemp("models") / NAME)


@pytest.fixture
def started() -> Iterator[list[Serving]]:
    """What a test has started, and may not have ended."""
    serving: list[Serving] = []
    with ExitStack() as stack:
        stack.callback(lambda: [end(one) for one in serving])
        yield serving


def start(log: Path, folder: Path) -> Serving:
    arguments = ("--engine", "vllm", "--model", folder, "--dtype", "fp32", "--enforce-eager")
    return Serving(log, *arguments)


def ask(url: str, body: Any = None, *, key: str = KEY) -> tuple[int, Any, Any]:
    """Status, headers, content."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=HANGS) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, json.loads(error.read())["error"]


def documents(url: str) -> int:
    """Texts of documents that wait there, or are computed."""
    page = ask(f"{url}/metrics")[2].decode()
    return int(float(re.findall(r'^kalm_texts_in_progress{role="document"} (.*)$', page, re.M)[0]))


def first_not_ready(url: str) -> int | None:
    """The first status of /ready that is not 200; None where nobody listens any more."""
    until = time.monotonic() + HANGS
    while time.monotonic() < until:
        try:
            status = ask(f"{url}/ready")[0]
        except OSError:
            return None
        if status != 200:
            return status
    return 200


@pytest.fixture(scope="module")
def serving(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    serving = start(tmp_path_factory.mktemp("serving") / "log", folder)
    yield serving
    end(serving)


@pytest.fixture(scope="module")
def right(folder: Path) -> Any:
    return reference_vectors(folder, TEXTS)


class TestServing:
    def test_start_and_address_are_logged(self, serving: Serving, folder: Path) -> None:
        fingerprint = ask(f"{serving.url}/ready")[1]["X-Kalm-Identity"]
        ours = [line for line in serving.log.splitlines() if line.startswith("kalm serve: ")]
        assert ours == [
            f"kalm serve: loading {folder} with vLLM; a minute or more",
            f"kalm serve: ready: {NAME}, space {fingerprint}, key required, on {serving.url}",
        ]

    def test_every_client_gets_the_reference_vectors(
        self, serving: Serving, folder: Path, right: Any
    ) -> None:
        service: dict[str, Any] = {
            "backend": "http", "base_url": serving.url, "api_key": KEY, "model": NAME
        }  # fmt: skip
        with openai.OpenAI(base_url=f"{serving.url}/v1", api_key=KEY) as plain:
            answer = plain.embeddings.create(model=NAME, input=TEXTS)
        with KalmClient(**service, vector_dtype="float32") as client:
            result = client.embed(TEXTS)
        lang_chain, llama_index = ForLangChain(**service), ForLlamaIndex(**service)
        got = {
            "openai": [item.embedding for item in answer.data],
            "KalmClient": result.vectors,
            "LangChain": lang_chain.embed_documents(TEXTS),
            "LangChain, queries": [lang_chain.embed_query(text) for text in TEXTS[:3]],
            "LlamaIndex": llama_index.get_text_embedding_batch(TEXTS),
        }
        for name, vectors in got.items():
            assert cosines(np.asarray(vectors), right[: len(vectors)]).min() >= 0.99999, name
        tokens = {text: len(token_ids(folder, text)) for text in TEXTS}
        assert answer.usage.prompt_tokens == sum(tokens[text] for text in TEXTS)
        assert result.usage.tokens == sum(tokens.values())  # no text is sent twice
        lang_chain.close()
        llama_index.close()

    def test_the_key_is_required(self, serving: Serving) -> None:
        for path in ("/v1/embeddings", "/v1/models", "/ready", "/metrics"):
            assert ask(serving.url + path, key="wrong")[0] == 401
        assert ask(f"{serving.url}/ready")[0] == 200

    def test_phases_of_the_start_are_in_the_metrics(self, serving: Serving) -> None:
        page = ask(f"{serving.url}/metrics")[2].decode()
        for phase in ("load", "canary"):
            assert re.search(rf'^kalm_start_seconds{{phase="{phase}"}} \d', page, re.M)

    def test_documents_are_refused_under_overload_and_queries_answered(
        self, serving: Serving
    ) -> None:
        def count(name: str) -> int:
            page = ask(f"{serving.url}/metrics")[2].decode()
            return sum(int(float(n)) for n in re.findall(rf"^{re.escape(name)} (.*)$", page, re.M))

        in_progress = 'kalm_texts_in_progress{role="document"}'
        refusals = 'kalm_requests_total{code="service_unavailable"}'

        body = {"input": ["word " * 200] * 2_048}
        content = json.dumps(body).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Length: {len(content)}\r\n\r\n"
        address = ("127.0.0.1", int(serving.url.rpartition(":")[2]))
        with ExitStack() as callers:
            for number in range(1, 9):  # minutes of work: the last ones may be refused
                caller = callers.enter_context(socket.create_connection(address))
                caller.sendall(head.encode() + content)
                serving.wait_until(
                    lambda n=number: count(in_progress) // 2_048 + count(refusals) >= n, HANGS
                )
            assert count(in_progress) > 0
            status, headers, error = ask(f"{serving.url}/v1/embeddings", body)
            assert (status, error["code"]) == (503, "service_unavailable")
            assert int(headers["Retry-After"]) >= 1
            assert ask(f"{serving.url}/v1/embeddings", {"input": "a query"})[0] == 200
        serving.wait_until(
            lambda: count(in_progress) == 0, HANGS
        )  # nobody listens: nothing more is computed

    def test_requests_in_progress_finish_after_sigterm(self, serving: Serving, right: Any) -> None:
        others = serving.others()
        with ThreadPoolExecutor() as pool:
            body = {"input": TEXTS * 5, "encoding_format": "float"}
            answering = pool.submit(ask, f"{serving.url}/v1/embeddings", body)
            serving.wait_until(lambda: documents(serving.url) or answering.done(), HANGS)
            serving.process.terminate()
            status, _, content = answering.result()
        assert status == 200
        vectors = np.array([item["embedding"] for item in json.loads(content)["data"]])
        assert cosines(vectors, np.tile(right, (5, 1))).min() >= 0.99999
        assert serving.process.wait(HANGS) == 143
        assert gone(others)
        assert "Traceback" not in serving.log


def test_the_server_exits_when_the_core_dies(
    folder: Path, tmp_path: Path, started: list[Serving]
) -> None:
    serving = start(tmp_path / "log", folder)
    started.append(serving)
    url, others = serving.url, serving.others()
    body = {"input": ["word " * 200] * 500}
    with ThreadPoolExecutor(50) as pool:
        calls = [pool.submit(ask, f"{url}/v1/embeddings", body) for _ in range(30)]
        serving.wait_until(
            lambda: documents(url) == 30 * 500 or any(call.done() for call in calls), HANGS
        )
        serving.core().kill()
        red = first_not_ready(url)
        answers = [call.result() for call in calls]
    assert red in (503, None)
    # Those that were being computed; those that wait their turn learn it when the engine is closed.
    assert {status for status, _, _ in answers} == {503}
    codes = {error["code"] for _, _, error in answers}
    assert "container_failed" in codes
    assert codes <= {"container_failed", "service_unavailable"}
    status, last = serving.ends(HANGS)
    assert status == 1
    assert "was ended by SIGKILL" in last
    assert "Restart it" in last
    assert len(re.findall("^request ", serving.log, re.M)) == len(codes)  # not one for each call
    assert gone(others)


def test_no_process_outlives_a_server_killed_while_loading(
    folder: Path, tmp_path: Path, started: list[Serving]
) -> None:
    """Ready, too: `end` looks for what is left of each server that is killed here."""
    serving = start(tmp_path / "log", folder)
    started.append(serving)
    # The core is there, and on its way.
    serving.wait_until(serving.cores, LOADING)
    core = serving.core()
    end(serving)
    assert not core.is_running()


def test_ctrl_c_stops_a_loading_server(
    folder: Path, tmp_path: Path, started: list[Serving]
) -> None:
    """The whole process group gets the signal; the core must not log it."""
    serving = start(tmp_path / "log", folder)
    started.append(serving)
    serving.wait_until(lambda: len(serving.others()) > 1, LOADING)
    others = serving.others()
    os.killpg(serving.process.pid, signal.SIGINT)
    assert serving.process.wait(HANGS) == 128 + signal.SIGINT
    assert gone(others)
    assert "Traceback" not in serving.log


def test_a_failed_load_is_one_error(folder: Path, tmp_path: Path, started: list[Serving]) -> None:
    (tmp_path / "empty").mkdir()
    serving = start(tmp_path / "log", tmp_path / "empty")
    started.append(serving)
    status, last = serving.ends(HANGS)
    assert status == 1
    assert last.startswith(f"kalm serve: {tmp_path / 'empty'} lacks config.json")
    assert "Traceback" not in serving.log
