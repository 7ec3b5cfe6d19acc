"""What callers of the HTTP API send beside the ordinary: nulls, huge bodies, wrong paths, CORS."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr
from serving import embedded_engine, serving
from test_http_server import KEY, Answer, ask

from kalm_integrations import cli
from kalm_integrations.protocol import ECHO_HEADER, IDENTITY_HEADER
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.http.schema import MAX_INSTRUCTION, EmbeddingsBody
from modal_backend.service import EmbeddingService

ORIGIN = "https://app.example.com"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    service = EmbeddingService(embedded_engine())
    keys = BearerKeys([SecretStr(KEY)])
    with serving(create_app(service, keys=keys, cors_origins=[ORIGIN])) as url:
        yield url


def embed(url: str, body: Any, **headers: str) -> Answer:
    return ask(f"{url}/v1/embeddings", body, **headers)


def vectors(answer: Answer) -> Any:
    return np.array([item["embedding"] for item in answer.json["data"]])


class TestNull:
    OPTIONAL = sorted(EmbeddingsBody.model_fields.keys() - {"input"})

    @pytest.mark.parametrize("field", OPTIONAL)
    def test_a_field_that_is_null_is_absent(self, url: str, field: str) -> None:
        answer = embed(url, {"input": "K2", field: None})
        assert answer.status == 200
        assert np.array_equal(vectors(answer), vectors(embed(url, {"input": "K2"})))

    def test_all_of_them(self, url: str) -> None:
        assert embed(url, {"input": "K2"} | dict.fromkeys(self.OPTIONAL)).status == 200

    def test_texts_and_unknown_fields_are_not_optional(self, url: str) -> None:
        for body in ({"input": None}, {"input": "a", "prompt": None}):
            assert embed(url, body).status == 400


class TestSizes:
    @pytest.mark.parametrize(
        ("body", "status", "code"),
        [
            ({"input": ["a"] * 3_000}, 413, "request_too_large"),
            ({"input": ["a"] * 9_000}, 413, "request_too_large"),
            ({"input": [[]] * 90_000}, 413, "request_too_large"),
            ({"input": "a"} | {f"f{i}": 1 for i in range(9_000)}, 413, "request_too_large"),
            ({"input": "a"} | {f"f{i}": 1 for i in range(1_000)}, 400, "invalid_request"),
            ({"input": [[1] * 500] * 500}, 400, "invalid_argument"),
            ({"input": list(range(90_000))}, 400, "invalid_argument"),
            ({"input": "a", "instruction": "x" * 2**20}, 400, "invalid_request"),
            (
                {"input": ["a"] * 2_000, "instruction": "x" * (MAX_INSTRUCTION - 6) + "{text}"},
                413,
                "request_too_large",
            ),
            ({"input": "a", "instruction": "web_serch" * 1_500}, 400, "invalid_request"),
            ({"input": "a", "model": "m" * 2**20}, 404, "not_found"),
            ({"input": "a", "n" * 2**20: 1}, 400, "invalid_request"),
            ({"input": "a", "dimensions": 10**3_000}, 400, "invalid_request"),
            ({"input": "a", "dimensions": 10**300}, 400, "invalid_request"),
            ({"input": "\ufdfa" * 262_144}, 400, "input_too_long"),
            ({"input": "x" * 2**22}, 400, "input_too_long"),
        ],
        ids=lambda value: json.dumps(value)[:60],
    )
    def test_a_large_request_is_refused_with_a_short_message(
        self, url: str, body: Any, status: int, code: str
    ) -> None:
        answer = embed(url, body)
        assert (answer.status, answer.error["code"]) == (status, code)
        assert len(answer.body) < 1_500

    def test_long_headers_and_paths_are_not_echoed(self, url: str) -> None:
        for headers in ({"X-Kalm-Timeout": "9" * 5_000 + "x"}, {"Content-Encoding": "x" * 5_000}):
            answer = embed(url, {"input": "a"}, **headers)
            assert answer.status == 400
            assert len(answer.body) < 1_000
        assert len(ask(f"{url}/{'x' * 5_000}").body) < 1_000

    def test_a_large_body_is_answered_as_a_small_one(self, url: str) -> None:
        body = {"input": ["K2 is high.", "x" * 10_000], "user": "u" * 100_000}
        large = embed(url, body)
        assert large.status == 200
        assert np.array_equal(vectors(large), vectors(embed(url, body | {"user": "u"})))

    def test_every_text_with_a_lone_surrogate_is_named_in_a_large_body(self, url: str) -> None:
        body = {"input": ["a" * 1_000, "\ud800"] * 200}
        refused = embed(url, body)
        assert (refused.status, refused.error["code"]) == (400, "invalid_input")
        assert [bad["index"] for bad in refused.error["invalid"]] == list(range(1, 400, 2))

    def test_a_long_text_is_cut_before_the_instruction_is_added(self, url: str) -> None:
        long, end = "word " * 60_000, {"instruction": "Search: {text}", "truncate": "end"}
        cut = embed(url, {"input": [long], **end})
        assert np.allclose(vectors(cut), vectors(embed(url, {"input": [long[:50_000]], **end})))


class TestContentEncoding:
    @pytest.mark.parametrize(("encoding", "status"), [("", 200), ("Identity", 200), ("br", 400)])
    def test_only_identity_is_accepted(self, url: str, encoding: str, status: int) -> None:
        assert embed(url, {"input": "a"}, Content_Encoding=encoding).status == status


class TestPaths:
    @pytest.mark.parametrize(
        ("path", "right"),
        [
            ("/embeddings", "/v1/embeddings"),
            ("//v1/embeddings", "/v1/embeddings"),
            ("/v1/embeddings/", "/v1/embeddings"),
            ("/v1/v1/embeddings", "/v1/embeddings"),
            ("/V1/Embeddings", "/v1/embeddings"),
            ("/v1/models/", "/v1/models"),
            ("/models", "/v1/models"),
            ("/ready/", "/ready"),
            ("/v1/metrics", "/metrics"),
        ],
    )
    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_a_wrong_path_names_the_right_one_and_never_redirects(
        self, url: str, path: str, right: str, method: str
    ) -> None:
        # Without urllib, which follows redirects.
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        body = '{"input": "a"}' if method == "POST" else None
        connection.request(method, path, body, {"Authorization": f"Bearer {KEY}"})
        answer = connection.getresponse()
        content = json.loads(answer.read())
        connection.close()
        if path == "/v1/models/" and method == "POST":
            assert answer.status == 405
            return
        assert answer.status == 404
        assert right in content["error"]["message"]
        assert "location" not in answer.headers

    def test_an_unknown_path_gets_no_suggestion(self, url: str) -> None:
        answer = ask(f"{url}/nowhere")
        assert (answer.status, answer.error["code"]) == (404, "not_found")
        assert "/v1/" not in answer.error["message"]

    def test_a_wrong_method_names_the_right_one(self, url: str) -> None:
        for path, method, right in (
            ("/v1/embeddings", "GET", "POST"),
            ("/v1/models", "POST", "GET"),
        ):
            answer = ask(url + path, method=method)
            assert answer.status == 405
            assert right in answer.headers["Allow"]
            assert right in answer.error["message"]


class TestCors:
    def preflight(self, url: str, origin: str = ORIGIN) -> Answer:
        return ask(
            f"{url}/v1/embeddings",
            key=None,
            method="OPTIONS",
            Origin=origin,
            Access_Control_Request_Method="POST",
            Access_Control_Request_Headers="authorization, content-type, x-stainless-lang",
        )

    def test_a_preflight_needs_no_key(self, url: str) -> None:
        answer = self.preflight(url)
        assert answer.status == 200
        assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert "POST" in answer.headers["Access-Control-Allow-Methods"]
        allowed = answer.headers["Access-Control-Allow-Headers"]
        assert {"authorization", "x-stainless-lang"} <= set(allowed.replace(" ", "").split(","))

    def test_responses_and_errors_can_be_read_by_the_page(self, url: str) -> None:
        answers = [
            embed(url, {"input": "a"}, Origin=ORIGIN),
            embed(url, {"input": ""}, Origin=ORIGIN),
            ask(f"{url}/v1/embeddings", {"input": "a"}, key="wrong", Origin=ORIGIN),
            ask(f"{url}/nowhere", Origin=ORIGIN),
        ]
        assert [answer.status for answer in answers] == [200, 400, 401, 404]
        for answer in answers:
            assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
            exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
            assert {"X-Request-Id", "Retry-After", IDENTITY_HEADER, ECHO_HEADER} <= set(exposed)

    @pytest.mark.parametrize("origin", ["https://evil.example", ORIGIN + ".evil", "null"])
    def test_other_origins_get_nothing(self, url: str, origin: str) -> None:
        assert self.preflight(url, origin).status == 400
        answer = embed(url, {"input": "a"}, Origin=origin)
        assert "Access-Control-Allow-Origin" not in answer.headers

    def test_it_is_off_by_default(self) -> None:
        app = create_app(EmbeddingService(embedded_engine()), keys=BearerKeys(None))
        with serving(app) as url:
            assert self.preflight(url).status == 405
            answer = ask(f"{url}/v1/embeddings", {"input": "a"}, key=None, Origin=ORIGIN)
            assert answer.status == 200
            assert "Access-Control-Allow-Origin" not in answer.headers

    @pytest.mark.parametrize(
        "origin", ["app.example.com", ORIGIN + "/", ORIGIN + "/x", "https://App.example.com", ""]
    )
    def test_an_origin_that_no_browser_sends_is_refused(
        self, origin: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KALM_API_KEY", "k")
        assert cli.main(["serve", "--port", "0", "--cors-origin", origin]) == 2
        assert "--cors-origin" in capsys.readouterr().err
