"""The HTTP API, served by uvicorn over the real embedded engine, called by a plain HTTP client."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr
from serving import embedded_engine, serving

from kalm_integrations import KalmClient
from kalm_integrations.codec import MEDIA_TYPE, unpack
from kalm_integrations.errors import ContainerFailedError, KalmError, ServiceUnavailableError
from kalm_integrations.models import EMBEDDED
from kalm_integrations.protocol import (
    IDENTITY_HEADER,
    TIMEOUT_HEADER,
    WARNING_HEADER,
    ServiceWarning,
)
from modal_backend.admission import Admission
from modal_backend.engines.base import EngineOutput
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.service import EmbeddingService

KEY, OTHER_KEY = "correct-horse", "battery-staple"
MODEL = EMBEDDED.space.model
local = KalmClient(backend="local", vector_dtype="float32")


@dataclass
class Answer:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]


def ask(
    url: str, body: Any = None, *, key: str | None = KEY, method: str | None = None, **headers: str
) -> Answer:
    """A request with nothing of ours in it. A body that is not bytes is sent as JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        fields["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data, fields, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return Answer(response.status, response.headers, response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    service = EmbeddingService(embedded_engine())
    keys = [SecretStr(KEY), SecretStr(OTHER_KEY)]
    with serving(create_app(service, keys=BearerKeys(keys), max_body_bytes=100_000)) as url:
        yield url


class TestEmbeddings:
    @pytest.mark.parametrize("encoding", [None, "float", "base64"])
    @pytest.mark.parametrize("texts", ["one text", ["a", "b", "a"]])
    def test_the_response_is_openais(
        self, url: str, texts: str | list[str], encoding: str | None
    ) -> None:
        body: dict[str, Any] = {"input": texts, "model": MODEL, "user": "somebody"}
        if encoding:
            body["encoding_format"] = encoding
        answer = ask(f"{url}/v1/embeddings", body)
        assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
        content = answer.json
        assert (content["object"], content["model"]) == ("list", MODEL)
        expected = local.embed([texts] if isinstance(texts, str) else texts).vectors
        assert [item["index"] for item in content["data"]] == list(range(len(expected)))
        rows = [item["embedding"] for item in content["data"]]
        if encoding == "base64":
            rows = [np.frombuffer(base64.b64decode(row), dtype="<f4") for row in rows]
        assert np.allclose(rows, expected, atol=1e-6)

    def test_usage_is_exact(self, url: str) -> None:
        usage = ask(f"{url}/v1/embeddings", {"input": ["How tall is K2?", "x"]}).json["usage"]
        tokens = local.embed(["How tall is K2?"]).usage.tokens + local.embed(["x"]).usage.tokens
        assert usage == {"prompt_tokens": tokens, "total_tokens": tokens}

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_packed_vectors_by_accept(self, url: str, dtype: str) -> None:
        body = {"input": ["a", "b"], "embed_dtype": dtype}
        answer = ask(f"{url}/v1/embeddings", body, Accept=MEDIA_TYPE)
        assert answer.headers["Content-Type"] == MEDIA_TYPE
        packed = unpack(answer.body)
        assert packed.vectors.dtype == dtype
        assert packed.identity == EMBEDDED.space
        assert np.allclose(packed.vectors, local.embed(["a", "b"]).vectors, atol=1e-3)

    def test_instructions(self, url: str) -> None:
        def vector(**fields: Any) -> Any:
            answer = ask(f"{url}/v1/embeddings", {"input": "K2", **fields})
            return np.array(answer.json["data"][0]["embedding"])

        plain = local.embed(["K2"]).vectors[0]
        instructed = local.embed(["Search: K2"]).vectors[0]
        for fields in ({}, {"input_type": "document"}, {"input_type": "query"}):
            assert np.allclose(vector(**fields), plain, atol=1e-6)  # this model has no prompt
        assert np.allclose(vector(instruction="Search: {text}"), instructed, atol=1e-6)

    def test_truncate(self, url: str) -> None:
        body = {"input": ["x", "word " * 15_000]}
        refused = ask(f"{url}/v1/embeddings", body)
        assert (refused.status, refused.error["code"]) == (400, "input_too_long")
        assert [bad["index"] for bad in refused.error["invalid"]] == [1]
        assert ask(f"{url}/v1/embeddings", body | {"truncate": "end"}).status == 200


REFUSED: dict[str, tuple[Any, int, str, str]] = {
    "no JSON": (b"{", 400, "invalid_request", "the body is not JSON"),
    "no object": ([1], 400, "invalid_request", "the body: "),
    "no input": ({}, 400, "invalid_request", "input: Field required"),
    "token ids": ({"input": [1, 2]}, 400, "invalid_argument", "token ids"),
    "lists of token ids": ({"input": [[1], [2]]}, 400, "invalid_argument", "token ids"),
    "an empty list": ({"input": []}, 400, "invalid_argument", "empty"),
    "a number": ({"input": 7}, 400, "invalid_argument", "neither a string nor a list"),
    "an empty text": ({"input": ["a", ""]}, 400, "invalid_input", r"texts\[1\] is empty"),
    "null": ({"input": ["a", None]}, 400, "invalid_input", r"texts\[1\] is None"),
    "surrogate": (b'{"input": ["\\ud800"]}', 400, "invalid_input", r"texts\[0\] has a lone surr"),
    "unknown field": ({"input": "a", "prompt_name": "q"}, 400, "invalid_request", "prompt_name: "),
    "vllm's field": ({"input": "a", "add_special_tokens": False}, 400, "invalid_request", "add_sp"),
    "wrong dimensions": ({"input": "a", "dimensions": 256}, 400, "invalid_request", "has 512"),
    "text as dimensions": ({"input": "a", "dimensions": "512"}, 400, "invalid_request", "dimensi"),
    "wrong encoding": ({"input": "a", "encoding_format": "hex"}, 400, "invalid_request", "base64"),
    "another model": ({"input": "a", "model": "ada-002"}, 404, "not_found", "'ada-002' is not ser"),
    "misspelt preset": (
        {"input": "a", "instruction": "web_serch"},
        400,
        "invalid_request",
        "did y",
    ),
    "float16 in JSON": ({"input": "a", "embed_dtype": "float16"}, 400, "invalid_request", "Accept"),
    "too many texts": ({"input": ["a"] * 2049}, 413, "request_too_large", "2049 texts"),
    "too large": ({"input": "a" * 100_000}, 413, "request_too_large", "100,000 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_request_is_refused(url: str, name: str) -> None:
    body, status, code, message = REFUSED[name]
    answer = ask(f"{url}/v1/embeddings", body)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert re.search(message, answer.error["message"])
    assert answer.error["type"] == "invalid_request_error"


class TestHeaders:
    def test_timeouts(self, url: str) -> None:
        answer = ask(f"{url}/v1/embeddings", {"input": "a"}, **{TIMEOUT_HEADER: "soon"})
        assert (answer.status, answer.error["code"]) == (400, "invalid_request")
        assert ask(f"{url}/v1/embeddings", {"input": "a"}, **{TIMEOUT_HEADER: "5"}).status == 200
        late = ask(f"{url}/v1/embeddings", {"input": "a"}, **{TIMEOUT_HEADER: "1e-9"})
        assert (late.status, late.error["code"]) == (504, "deadline_exceeded")

    def test_a_compressed_body_is_refused(self, url: str) -> None:
        answer = ask(f"{url}/v1/embeddings", b"\x1f\x8b", Content_Encoding="gzip")
        assert (answer.status, answer.error["code"]) == (400, "invalid_request")

    def test_every_response_has_identity_and_request_id(self, url: str) -> None:
        for path in ("/health", "/ready", "/v1/models", "/v1/embeddings", "/nowhere", "/metrics"):
            for key in (KEY, None):
                answer = ask(url + path, key=key, X_Request_Id="mine-1")
                assert answer.headers[IDENTITY_HEADER] == EMBEDDED.space.fingerprint
                assert answer.headers["X-Request-Id"] == "mine-1"
        forged = ask(f"{url}/health", X_Request_Id="a b;c")
        assert len(forged.headers["X-Request-Id"]) == 32


class TestKeys:
    @pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/models", "/ready", "/metrics", "/no"])
    @pytest.mark.parametrize("key", [None, "", "wrong", KEY[:-1], KEY + "x", KEY.upper()])
    def test_every_route_but_health_needs_a_key(self, url: str, path: str, key: str | None) -> None:
        answer = ask(url + path, key=key)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert KEY not in answer.body.decode()

    @pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"])
    def test_no_route_that_there_is_answers_without_the_right_key(self, method: str) -> None:
        """Also one that is added later."""
        service = EmbeddingService(embedded_engine())
        app: Any = create_app(service, keys=BearerKeys([SecretStr(KEY)]))
        paths = [route.path.replace("{name:path}", MODEL) for route in app._app.routes]
        assert len(paths) > 6

        async def status(path: str, key: str | None) -> int:
            sent: list[Any] = []
            headers = [] if key is None else [(b"authorization", b"Bearer " + key.encode())]
            scope = {"type": "http", "http_version": "1.1", "method": method, "path": path}
            scope |= {"headers": headers, "query_string": b"", "scheme": "http", "root_path": ""}
            scope |= {"client": None, "server": ("there", 80), "state": {}}

            async def receive() -> Any:
                return {"type": "http.request", "body": b"{}", "more_body": False}

            async def send(message: Any) -> None:
                sent.append(message)

            await app(scope, receive, send)
            return int(sent[0]["status"])

        for path in paths:
            refused = [asyncio.run(status(path, key)) for key in (None, "", "wrong", KEY[:-1])]
            admitted = asyncio.run(status(path, KEY))
            if path == "/health":
                assert {*refused, admitted} <= {200, 405}
            else:
                assert {*refused} == {401}
                assert admitted in (200, 400, 405)

    def test_another_scheme_is_refused(self, url: str) -> None:
        assert ask(f"{url}/ready", key=None, Authorization=f"Basic {KEY}").status == 401

    @pytest.mark.parametrize("key", [KEY, OTHER_KEY])
    def test_each_of_several_keys_is_valid(self, url: str, key: str) -> None:
        assert ask(f"{url}/ready", key=key).status == 200

    def test_health_needs_no_key(self, url: str) -> None:
        assert ask(f"{url}/health", key=None).json == {"status": "alive"}


class TestOtherRoutes:
    def test_models_reports_the_identity(self, url: str) -> None:
        (model,) = ask(f"{url}/v1/models").json["data"]
        assert model["id"] == MODEL
        assert model["identity"] == EMBEDDED.space.to_dict()
        assert model["fingerprint"] == EMBEDDED.space.fingerprint
        assert (model["dimensions"], model["max_tokens"]) == ([512], 8192)
        assert ask(f"{url}/v1/models/{MODEL}").json == model
        assert ask(f"{url}/v1/models/other").status == 404

    def test_unknown_paths_and_methods(self, url: str) -> None:
        for answer, status in ((ask(f"{url}/no"), 404), (ask(f"{url}/v1/embeddings"), 405)):
            assert (answer.status, answer.error["code"]) == (status, "not_found")

    def test_warnings_are_reported_in_models_metrics_and_headers(self) -> None:
        service = EmbeddingService(embedded_engine())
        first, second = ServiceWarning("one_thing", "is wrong."), ServiceWarning("another", "too.")
        with serving(create_app(service, keys=BearerKeys([SecretStr(KEY)]))) as url:

            def reported() -> tuple[Any, ...]:
                (model,) = ask(f"{url}/v1/models").json["data"]
                metrics = ask(f"{url}/metrics").body.decode()
                header = ask(f"{url}/v1/embeddings", {"input": "a"}).headers[WARNING_HEADER]
                return (
                    model["warnings"],
                    re.findall(r"^(kalm_warning\S+) 1.0$", metrics, re.M),
                    header,
                )

            assert reported() == ([], [], None)
            service.warnings = (first, second)
            assert reported() == (
                [asdict(first), asdict(second)],
                ['kalm_warning{code="one_thing"}', 'kalm_warning{code="another"}'],
                "one_thing,another",
            )
            assert ask(f"{url}/nowhere", key=None).headers[WARNING_HEADER] == "one_thing,another"
            service.warnings = (second,)
            assert reported()[1:] == (['kalm_warning{code="another"}'], "another")

    def test_metrics_count(self, url: str) -> None:
        def count(name: str) -> float:
            page = ask(f"{url}/metrics").body.decode()
            return sum(float(row.split()[-1]) for row in page.splitlines() if row.startswith(name))

        before = [count(name) for name in ("kalm_texts_total", 'kalm_requests_total{code="ok"}')]
        ask(f"{url}/v1/embeddings", {"input": ["a", "b", "c"]})
        after = [count(name) for name in ("kalm_texts_total", 'kalm_requests_total{code="ok"}')]
        assert [b - a for a, b in zip(before, after, strict=True)] == [3, 1]
        assert count('kalm_request_seconds_count{role="document"}') >= 1
        assert count("kalm_texts_in_progress") == 0


class SlowEngine:
    """The embedded engine, but every call takes `seconds` or raises `error`."""

    identity = EMBEDDED.space
    dimensions = (512,)
    max_tokens = 8192
    query_template = "{text}"

    def __init__(self, seconds: float, error: Exception | None = None) -> None:
        self._real = embedded_engine()
        self._seconds = seconds
        self._error = error
        self.started: list[str] = []
        self.cancelled = threading.Event()

    async def embed(self, texts: Sequence[str], **options: Any) -> EngineOutput:
        self.started += texts
        if self._error is not None:
            raise self._error
        try:
            await asyncio.sleep(self._seconds)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return await self._real.embed(texts, **options)

    async def close(self) -> None: ...


def count_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all batches that the embedded engine computes."""
    computed: list[int] = []
    backend = embedded_engine()._backend
    encode = backend.encode
    monkeypatch.setattr(backend, "encode", lambda ids: (computed.append(len(ids)), encode(ids))[1])
    return computed


class TestLoad:
    def test_the_limit_of_requests_does_not_make_the_process_look_dead(self) -> None:
        service = EmbeddingService(embedded_engine())
        with serving(create_app(service, keys=BearerKeys(None), max_concurrency=0)) as url:
            refused = ask(f"{url}/v1/embeddings", {"input": "a"}, key=None)
            assert (refused.status, refused.error["code"]) == (503, "service_unavailable")
            assert refused.headers["Retry-After"] == "2"
            assert ask(f"{url}/health", key=None).status == 200

    def test_the_time_of_the_upload_counts(self) -> None:
        engine = SlowEngine(0)
        body = b'{"input": "a"}'
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        with serving(create_app(EmbeddingService(engine), keys=BearerKeys(None))) as url:
            port = int(url.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), timeout=30) as caller:
                caller.sendall(f"{head}{TIMEOUT_HEADER}: 0.1\r\n\r\n".encode())
                time.sleep(0.3)  # longer than the timeout
                caller.sendall(body)
                assert caller.recv(100).startswith(b"HTTP/1.1 504 ")
        assert not engine.started

    def test_a_disconnected_caller_cancels_the_engines_work(self) -> None:
        engine = SlowEngine(30)
        with serving(create_app(EmbeddingService(engine), keys=BearerKeys(None))) as url:
            client = KalmClient(base_url=url, model=MODEL, timeout=0.5)
            with pytest.raises(KalmError):
                client.embed(["a"])
            assert engine.cancelled.wait(60)
            client.close()

    def test_nothing_is_computed_after_the_deadline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        computed = count_computed(monkeypatch)
        texts = [f"{i} " * 400 for i in range(1_000)]
        with serving(create_app(EmbeddingService(embedded_engine()), keys=BearerKeys(None))) as url:
            body = {"input": texts}
            answer = ask(f"{url}/v1/embeddings", body, key=None, **{TIMEOUT_HEADER: "0.5"})
            assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")
            reached = sum(computed)
            time.sleep(0.3)
            assert reached == sum(computed) < 1_000

    def test_nothing_is_computed_after_the_caller_disconnects(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        computed = count_computed(monkeypatch)
        body = json.dumps({"input": [f"{i} " * 400 for i in range(1_000)]}).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with serving(create_app(EmbeddingService(embedded_engine()), keys=BearerKeys(None))) as url:
            port = int(url.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as caller:
                caller.sendall(head.encode() + body)
                while not computed:
                    time.sleep(0.01)
            time.sleep(0.5)
            reached = sum(computed)
            time.sleep(0.5)
            assert reached == sum(computed) < 1_000

    def test_overload_gets_503_and_queries_have_their_own_capacity(self) -> None:
        engine = SlowEngine(1)
        admission = Admission({"document": 4, "query": 2})
        service = EmbeddingService(engine, admission)
        answers: list[Answer] = []
        with serving(create_app(service, keys=BearerKeys(None))) as url:

            def post(texts: list[str]) -> None:
                answers.append(ask(f"{url}/v1/embeddings", {"input": texts}, key=None))

            threads = [threading.Thread(target=post, args=(["a", "b"],)) for _ in range(3)]
            for thread in threads:
                thread.start()
                time.sleep(0.1)
            query = ask(f"{url}/v1/embeddings", {"input": "q"}, key=None)
            for thread in threads:
                thread.join()
        assert query.status == 200
        refused = [answer for answer in answers if answer.status == 503]
        assert len(refused) == 1
        assert refused[0].headers["Retry-After"] == "2"
        assert refused[0].error["code"] == "service_unavailable"
        assert service.admission.texts_in_progress == {"query": 0, "document": 0}

    def test_our_client_retries_through_an_overload(self, quick_retries: None) -> None:
        service = EmbeddingService(SlowEngine(0.05), Admission({"document": 3, "query": 2}))
        with (
            serving(create_app(service, keys=BearerKeys(None))) as url,
            KalmClient(
                base_url=url, model=MODEL, batch_size=2, max_retries=50, max_concurrency=3
            ) as client,
        ):
            import modal_backend.admission as module

            module_after, module.RETRY_AFTER = module.RETRY_AFTER, 0.01  # type: ignore[misc]
            try:
                assert len(client.embed([f"text {i}" for i in range(12)])) == 12
            finally:
                module.RETRY_AFTER = module_after  # type: ignore[misc]

    def test_an_unexpected_engine_error_is_logged_and_not_revealed(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with (
            serving(
                create_app(
                    EmbeddingService(SlowEngine(0, KeyError("internals"))), keys=BearerKeys(None)
                )
            ) as url,
            caplog.at_level(logging.ERROR),
        ):
            answer = ask(f"{url}/v1/embeddings", {"input": "a"}, key=None)
        assert (answer.status, answer.error["code"]) == (500, "unexpected")
        assert "internals" not in answer.body.decode()
        assert answer.headers["X-Request-Id"] in answer.error["message"]
        assert answer.headers["X-Request-Id"] in caplog.text
        assert "KeyError: 'internals'" in caplog.text

    def test_an_unavailable_engine_gets_503(self) -> None:
        engine = SlowEngine(0, ServiceUnavailableError("the engine restarts.", retry_after=7.2))
        with serving(create_app(EmbeddingService(engine), keys=BearerKeys(None))) as url:
            answer = ask(f"{url}/v1/embeddings", {"input": "a"}, key=None)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "8")
        assert answer.error["type"] == "server_error"

    def test_repeated_errors_are_logged_once(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = SlowEngine(0, ContainerFailedError("the core died."))
        with (
            serving(create_app(EmbeddingService(engine), keys=BearerKeys(None))) as url,
            caplog.at_level(logging.WARNING, "modal_backend.http.handlers"),
        ):

            def fail(times: int) -> list[str]:
                caplog.clear()
                for _ in range(times):
                    assert ask(f"{url}/v1/embeddings", {"input": "a"}, key=None).status == 503
                return [record.getMessage() for record in caplog.records]

            (line,) = fail(100)
            assert "the core died." in line
            engine._error = ServiceUnavailableError("too much waits.", retry_after=1)
            (line,) = fail(100)  # another kind is a line of its own
            assert "too much waits." in line
            monkeypatch.setattr("modal_backend.http.handlers._LOG_SECONDS", 0)
            (line,) = fail(1)
            assert line.endswith(" (99 similar errors since the last such line)")
            (line,) = fail(1)
            assert "similar errors" not in line
            page = ask(f"{url}/metrics", key=None).body.decode()
        assert 'kalm_requests_total{code="container_failed"} 100.0' in page
        assert 'kalm_requests_total{code="service_unavailable"} 102.0' in page
