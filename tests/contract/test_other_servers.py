"""Servers that are not ours: one client for all, whatever they refuse and leave out.

docs/servers.md has the table. tests/vllm/test_stock_vllm.py runs a real one.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scripted import DIMENSIONS, vectors_of
from stock_server import LIMIT, STOCK, Stock, StockServer, error

from kalm_integrations import KalmClient, errors
from kalm_integrations.models import KALM
from kalm_integrations.transports.openai_server import SHORT_TEXT

TEXTS = [f"text {i}" for i in range(150)]
CUTTING = [name for name, stock in STOCK.items() if stock.cuts({"truncate": True}) or stock.cuts(
    {"truncate_prompt_tokens": -1, "truncation_side": "right"}
)]  # fmt: skip


def client_of(server: StockServer, **options: Any) -> KalmClient:
    return KalmClient(base_url=server.url, **{"model": "kalm", "max_retries": 0, **options})


def with_long(*indices: int) -> list[str]:
    return ["long " * LIMIT + str(i) if i in indices else text for i, text in enumerate(TEXTS)]


@pytest.fixture(params=STOCK)
def server(request: pytest.FixtureRequest) -> Any:
    with StockServer(stock=STOCK[request.param]) as server:
        yield server


class TestEveryServer:
    def test_vectors_arrive_in_order(self, server: StockServer) -> None:
        with client_of(server, batch_size=32) as client:
            assert np.array_equal(client.embed(TEXTS).vectors, vectors_of(TEXTS))
            assert client.warm_up().dimensions == 0

    @pytest.mark.parametrize("bad", [(6,), (0,), (0, 1), (127,), (128, 149), (3, 64, 65, 140)])
    def test_long_texts_are_named_and_all_others_embedded(
        self, server: StockServer, bad: tuple[int, ...]
    ) -> None:
        if server.stock.cuts({}):
            pytest.skip("it always cuts")
        texts, others = with_long(*bad), [i for i in range(len(TEXTS)) if i not in bad]
        with client_of(server, max_concurrency=1) as client:
            client.embed(["first"])
            server.received.clear()
            parts = list(client.iter_embed(texts, on_error="skip"))
            rejected = [each.index for part in parts for each in part.rejected]
            assert tuple(sorted(rejected)) == bad
            result = {int(i): row for part in parts for i, row in part}
            assert sorted(result) == others
            assert np.array_equal([result[i] for i in others], vectors_of(TEXTS)[others])
            # A binary search for each, in 2 requests a step; one more if no reason is given.
            assert len(server.posted) <= 2 + len(bad) * (2 * math.ceil(math.log2(128)) + 1)
            with pytest.raises(errors.InvalidInputError) as caught:
                client.embed(texts)
        assert {each.index for each in caught.value.invalid} <= set(bad)

    def test_what_it_refuses_is_asked_for_once(self, server: StockServer) -> None:
        async def main() -> None:
            async with client_of(server, batch_size=5, max_concurrency=16) as client:
                await asyncio.gather(*(client.aembed(TEXTS[i : i + 40]) for i in range(20)))

        asyncio.run(main())
        refused = [
            body for body in server.embedded if body["encoding_format"] == "base64"
        ] if server.stock.refuses_base64 else []  # fmt: skip
        assert [body["input"] for body in refused] == ([[SHORT_TEXT]] if refused else [])

    def test_native_dimensions_are_not_requested(self, server: StockServer) -> None:
        with client_of(server, dimensions=DIMENSIONS) as client:
            assert client.embed(["a"]).vectors.shape == (1, DIMENSIONS)
        assert not any("dimensions" in body for body in server.embedded)

    def test_an_error_of_the_whole_request_is_not_blamed_on_a_text(
        self, server: StockServer
    ) -> None:
        class Refusing(StockServer):
            def _answer(self, request: Any) -> Any:
                if request.method == "GET":
                    return super()._answer(request)
                return 400, {"error": {"message": "no such model"}}

        with Refusing(stock=server.stock) as refusing, client_of(refusing) as client:
            with pytest.raises(errors.ConfigurationError, match="no such model"):
                list(client.iter_embed(TEXTS, on_error="skip"))
        assert {len(body["input"]) for body in refusing.embedded} == {1}


class TestTruncation:
    @pytest.mark.parametrize("name", CUTTING)
    def test_texts_are_cut_in_the_servers_own_way(self, name: str) -> None:
        texts = with_long(0, 9)
        with StockServer(stock=STOCK[name]) as server:
            with client_of(server, truncate="end", vector_dtype="float32") as client:
                vectors = client.embed(texts).vectors
        assert np.allclose(vectors, vectors_of([text[:LIMIT] for text in texts], "float32"))

    @pytest.mark.parametrize("name", ["OpenAI", "a strict schema"])
    def test_a_server_that_refuses_to_cut_is_an_error_at_the_first_contact(self, name: str) -> None:
        with StockServer(stock=STOCK[name]) as server:
            with client_of(server, truncate="end") as client:
                with pytest.raises(errors.ConfigurationError, match='truncate="end"'):
                    client.embed(TEXTS)
        assert not server.posted

    @pytest.mark.parametrize("name", ["TEI", "LM Studio", "llama.cpp", "Ollama"])
    def test_a_server_that_ignores_it_gets_its_long_texts_named(self, name: str) -> None:
        with StockServer(stock=STOCK[name]) as server:
            with client_of(server, truncate="end") as client:
                with pytest.raises(errors.InputTooLongError, match="although") as caught:
                    client.embed(with_long(7))
        assert [each.index for each in caught.value.invalid] == [7]

    def test_it_is_not_sent_otherwise(self) -> None:
        with StockServer() as server, client_of(server) as client:
            client.embed(["a"])
        assert not any("trunc" in name for body in server.embedded for name in body)


class TestAnswers:
    @staticmethod
    def embed(change: Any, texts: list[str], **options: Any) -> Any:
        def unless_short(content: dict[str, Any]) -> Any:
            return change(content) if len(content["data"]) == len(texts) > 1 else None

        with StockServer(stock=Stock(change=unless_short)) as server:
            with client_of(server, **options) as client:
                return client.embed(texts)

    @pytest.mark.parametrize(
        "usage",
        [None, {}, {"prompt_tokens": None}, {"prompt_tokens": 0}, {"prompt_tokens": math.inf},
         {"prompt_tokens": "9"}, []],
    )  # fmt: skip
    def test_an_unknown_number_of_tokens_is_none(self, usage: Any) -> None:
        result = self.embed(lambda content: content | {"usage": usage}, TEXTS[:3])
        assert result.usage.tokens is None
        assert np.array_equal(result.vectors, vectors_of(TEXTS[:3]))

    def test_unknown_and_known_numbers_are_unknown_together(self) -> None:
        used = []
        with StockServer(stock=STOCK["Ollama"]) as server:
            with client_of(server, batch_size=50, on_usage=used.append) as client:
                assert client.embed(TEXTS).usage.tokens is None
        assert [each.tokens for each in used] == [None] * 3

    def test_the_total_serves_as_the_number_of_tokens(self) -> None:
        usage = {"total_tokens": 12}
        assert self.embed(lambda c: c | {"usage": usage}, TEXTS[:3]).usage.tokens == 12

    @pytest.mark.parametrize("order", [[2, 0, 1], [0, 1, 2], [1, 2, 0]])
    def test_vectors_are_sorted_by_index(self, order: list[int]) -> None:
        def shuffle(content: dict[str, Any]) -> None:
            content["data"] = [content["data"][i] for i in order]

        assert np.array_equal(self.embed(shuffle, TEXTS[:3]).vectors, vectors_of(TEXTS[:3]))

    @pytest.mark.parametrize("indices", [[0, None, 2], [1, 2, 3], [0, 0, 1], ["0", "1", "2"]])
    def test_strange_indices_are_refused(self, indices: list[Any]) -> None:
        def change(content: dict[str, Any]) -> None:
            for item, index in zip(content["data"], indices, strict=True):
                item["index"] = index

        with pytest.raises(errors.InvalidResponseError, match="indices"):
            self.embed(change, TEXTS[:3])

    @pytest.mark.parametrize(
        "embedding", [None, [], [None, 1.0], [1.0, 0.0], [0.0] * (DIMENSIONS - 1) + [math.nan]]
    )
    def test_a_text_without_a_proper_vector_is_named(self, embedding: Any) -> None:
        def change(content: dict[str, Any]) -> None:
            content["data"][1]["embedding"] = embedding

        with pytest.raises(errors.InvalidResponseError) as caught:
            self.embed(change, TEXTS[:3])
        assert [each.index for each in caught.value.invalid] == [1]

    @pytest.mark.parametrize("embedding", ["@@", {"a": 1}, [[1.0] * DIMENSIONS], 7, "AAA="])
    def test_what_is_no_vector_is_refused(self, embedding: Any) -> None:
        def change(content: dict[str, Any]) -> None:
            content["data"][1]["embedding"] = embedding

        with pytest.raises(errors.InvalidResponseError):
            self.embed(change, TEXTS[:3])

    def test_whole_numbers_and_other_fields_are_accepted(self) -> None:
        def change(content: dict[str, Any]) -> None:
            for item in content["data"]:
                item.update(embedding=[1] + [0] * (DIMENSIONS - 1), extra={"a": 1})
            content.update(id="x", created=1, extra=[1])

        assert self.embed(change, TEXTS[:3]).vectors[:, 0].tolist() == [1, 1, 1]


def embedding(change: Callable[[bytes], Any]) -> Callable[[dict[str, Any]], None]:
    """Changes each vector, from float32 bytes."""

    def changed(content: dict[str, Any]) -> None:
        for item in content["data"]:
            sent = item["embedding"]
            is_text = isinstance(sent, str)
            raw = base64.b64decode(sent) if is_text else np.array(sent, "<f4").tobytes()
            item["embedding"] = change(raw)

    return changed


STRANGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no vectors": lambda content: content | {"data": []},
    "null": lambda content: content | {"data": None},
    "an object of vectors": lambda content: content | {"data": dict(enumerate(content["data"]))},
    "vectors without items": lambda content: (
        content | {"data": [item["embedding"] for item in content["data"]]}
    ),
    "only a list": lambda content: content["data"],
    "booleans": embedding(lambda raw: [True] + [False] * (DIMENSIONS - 1)),
    "a list in a list": embedding(lambda raw: [np.frombuffer(raw, "<f4").tolist()]),
    "an object": embedding(lambda raw: {"float": np.frombuffer(raw, "<f4").tolist()}),
    "digits": embedding(lambda raw: [str(value) for value in np.frombuffer(raw, "<f4")]),
    "base64 with line breaks": embedding(lambda raw: base64.encodebytes(raw).decode()),
    "base64 for URLs": embedding(lambda raw: base64.urlsafe_b64encode(raw).decode()),
    "float64": embedding(
        lambda raw: base64.b64encode(np.frombuffer(raw, "<f4").astype("<f8")).decode()
    ),
    "big-endian": embedding(
        lambda raw: base64.b64encode(np.frombuffer(raw, "<f4").astype(">f4")).decode()
    ),
    "a page": lambda _: "<html><title>Sign in</title></html>",
    "an error with status 200": lambda _: error("Rate limit exceeded", code=429),
    "nothing": lambda _: "",
    "bytes of a compressed answer": lambda content: gzip.compress(json.dumps(content).encode()),
    "a terminal's commands": lambda _: "\x1b[2J\x00\r\x1b]0;title\x07",
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_answer_is_refused_at_first_and_later(name: str) -> None:
    with StockServer() as server, client_of(server, query_instruction="none") as client:
        for stock in (Stock(change=STRANGE[name]), Stock(), Stock(change=STRANGE[name])):
            server.stock = stock
            if stock.change is STRANGE[name]:
                with pytest.raises(errors.InvalidResponseError) as caught:
                    client.embed(TEXTS[:3])
                assert str(caught.value).isprintable()
            else:
                assert np.array_equal(client.embed(TEXTS[:3]).vectors, vectors_of(TEXTS[:3]))


class TestModelNames:
    @staticmethod
    def embed(names: str | None, model: str | None, **options: Any) -> Any:
        with StockServer(stock=Stock(names=names)) as server:
            with client_of(server, model=model, **options) as client:
                return client.embed(["a"])

    @pytest.mark.parametrize(
        ("names", "model"),
        [
            ("/models/kalm", "kalm"),
            ("hosted_vllm/KaLM", "kalm"),
            ("whatever", "kalm"),  # an alias says nothing of the model
            ("some/model", "other/name"),
        ],
    )
    def test_another_name_of_an_alias_is_accepted(self, names: str, model: str) -> None:
        assert len(self.embed(names, model)) == 1

    def test_an_alias_must_stay_the_same_model(self) -> None:
        with StockServer(stock=Stock(names="one")) as server, client_of(server) as client:
            client.embed(["a"])
            server.stock = Stock(names="two")
            with pytest.raises(errors.IdentityMismatchError, match="two"):
                client.embed(["a"])

    @pytest.mark.parametrize(
        ("names", "profile"),
        [(KALM.space.model, "kalm-mini"), ("universal-sentence-encoder-multilingual-3", "kalm")],
    )
    def test_a_known_model_must_be_that_of_the_profile(self, names: str, profile: str) -> None:
        with pytest.raises(errors.IdentityMismatchError):
            self.embed(names, "alias", profile=profile)

    def test_a_known_model_must_answer_under_its_name(self) -> None:
        with pytest.raises(errors.IdentityMismatchError, match="'whatever' answered"):
            self.embed("whatever", KALM.space.model)


class TestProfile:
    def test_an_unknown_model_is_warned_about_once(self, caplog: pytest.LogCaptureFixture) -> None:
        with StockServer() as server, client_of(server) as client:
            client.embed(["a"], role="query")
            client.embed(["b"], role="query")
            assert server.posted[0].texts == ["a"]
        assert caplog.text.count("queries get no instruction") == 1

    @pytest.mark.parametrize("options", [{"profile": "kalm"}, {"query_instruction": "none"}])
    def test_not_if_the_caller_has_chosen(
        self, caplog: pytest.LogCaptureFixture, options: dict[str, str]
    ) -> None:
        with StockServer() as server, client_of(server, **options) as client:
            with pytest.raises(errors.InvalidResponseError) if "profile" in options else _nothing():
                client.embed(["a"], role="query")
        assert "instruction" not in caplog.text

    def test_a_profile_decides_what_the_model_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        named = KalmClient(base_url="http://there", model="/models/1", profile="kalm").config
        assert named.served_model == "/models/1"
        assert named.query_template == KALM.query_template
        assert named.vector_dimensions == KALM.dimensions[0]
        assert named.expected_space == KALM.space
        monkeypatch.setenv("KALM_PROFILE", KALM.space.model)
        read = KalmClient(base_url="http://there", model="/models/1").config
        assert read.vector_identity == named.vector_identity
        assert read.cache_namespace == KalmClient(base_url="http://there").cache_namespace

    def test_an_unknown_profile_is_refused(self) -> None:
        with pytest.raises(errors.ConfigurationError, match=r"profile.*kalm-mini"):
            KalmClient(base_url="http://there", profile="calm")
        with pytest.raises(errors.ConfigurationError, match="profile"):
            KalmClient(backend="local", profile="kalm")


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture(autouse=True)
def all_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
