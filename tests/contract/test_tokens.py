"""Tokens that are counted, and texts that are cut: the same over every transport and encoding."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
from llama_index.core.storage.kvstore import SimpleKVStore
from scripted import ScriptedTransport
from serving import FaultyServer, embedded_engine, serving
from test_http_server import ask

from kalm_integrations import KalmClient, KalmModalEmbeddings, llama_index
from kalm_integrations.codec import MEDIA_TYPE, pack, unpack
from kalm_integrations.errors import ConfigurationError, CorruptedAnswerError, InvalidInputError
from kalm_integrations.models import EMBEDDED
from kalm_integrations.protocol import EmbedRequest
from kalm_integrations.transports.in_process import InProcessTransport
from modal_backend import rpc
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.service import EmbeddingService

MODEL, LIMIT = EMBEDDED.space.model, EMBEDDED.max_tokens
LONG = "word " * 15_000
TEXTS = ["K2 is high.", LONG, "猫", "K2 is high.", LONG + "!"]
CUT = (1, 4)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(create_app(EmbeddingService(embedded_engine()), keys=BearerKeys(None))) as url:
        yield url


class RpcTransport(InProcessTransport):
    """Modal's, less Modal."""

    async def embed(self, request: EmbedRequest) -> Any:
        reply = await rpc.embed_packed(EmbeddingService(embedded_engine()), asdict(request))
        return unpack(reply["packed"])

    async def count_tokens(self, request: EmbedRequest) -> list[int]:
        service = EmbeddingService(embedded_engine())
        return (await rpc.count_tokens(service, asdict(request)))["counts"]  # type: ignore[no-any-return]


@pytest.fixture(params=["in process", "HTTP", "RPC"])
def client(request: pytest.FixtureRequest, url: str) -> Iterator[KalmClient]:
    options: dict[str, Any] = {
        "in process": {"backend": "local"},
        "HTTP": {"base_url": url, "model": MODEL},
        "RPC": {"transport": RpcTransport(), "model": MODEL},
    }[request.param]
    with KalmClient(**options, truncate="end", batch_size=2) as client:
        yield client


class TestCounting:
    def test_counts_are_what_embedding_computes(self, client: KalmClient) -> None:
        counts = client.count_tokens(TEXTS)
        assert counts == asyncio.run(client.acount_tokens(TEXTS))
        assert [count > LIMIT for count in counts] == [index in CUT for index in range(5)]
        computed = sum(min(count, LIMIT) for count in (counts[0], counts[1], counts[2], counts[4]))
        assert client.embed(TEXTS).usage.tokens == computed

    def test_the_roles_instruction_counts(self, client: KalmClient) -> None:
        searching = client.with_options(query_instruction="Search: {text}")
        (query,) = searching.count_tokens(["K2"], role="query")
        assert query == searching.count_tokens(["Search: K2"])[0] > client.count_tokens(["K2"])[0]

    def test_a_text_that_cannot_be_embedded_is_named(self, client: KalmClient) -> None:
        with pytest.raises(InvalidInputError) as caught:
            client.count_tokens(["a", " "])
        assert [bad.index for bad in caught.value.invalid] == [1]

    def test_a_longer_text_than_a_request_takes_is_counted(self) -> None:
        (count,) = KalmClient(backend="local").count_tokens(["word " * 100_000])
        assert count > LIMIT

    def test_other_servers_and_transports_do_not_count(self) -> None:
        with (
            FaultyServer(ours=False) as server,
            KalmClient(base_url=server.url, model=MODEL) as client,
            pytest.raises(ConfigurationError),
        ):
            client.count_tokens(["a"])
        with pytest.raises(ConfigurationError, match="ScriptedTransport"):
            KalmClient(transport=ScriptedTransport(), model=MODEL).count_tokens(["a"])

    def test_the_route(self, url: str) -> None:
        body = {"input": TEXTS, "model": MODEL}
        answer = ask(f"{url}/v1/count_tokens", body).json
        counts = KalmClient(backend="local").count_tokens(TEXTS)
        assert answer == {"model": MODEL, "counts": counts, "max_tokens": LIMIT}
        instructed = {"input": "K2", "instruction": "Search: {text}"}
        (count,) = ask(f"{url}/query/v1/count_tokens", instructed).json["counts"]
        assert count == KalmClient(backend="local").count_tokens(["Search: K2"])[0]


class TestTruncation:
    def test_texts_that_were_cut_are_named(self, client: KalmClient) -> None:
        assert client.embed(TEXTS).truncated == CUT
        assert client.embed(TEXTS[2:4]).truncated == ()
        parts = list(client.iter_embed(TEXTS))
        assert sorted(index for part in parts for index in part.truncated or ()) == [*CUT]

    def test_a_text_over_the_limit_of_characters_is_cut_too(self, client: KalmClient) -> None:
        spaces = "a" + " " * 262_143  # far fewer tokens than the model reads
        assert client.embed([spaces, spaces + " "]).truncated == (1,)

    @pytest.mark.parametrize("encoding", ["float", "base64"])
    def test_json_names_them(self, url: str, encoding: str) -> None:
        body = {"input": TEXTS, "truncate": "end", "encoding_format": encoding}
        assert ask(f"{url}/v1/embeddings", body).json["truncated"] == [*CUT]

    def test_packed_vectors_name_them(self, url: str) -> None:
        body = {"input": TEXTS, "truncate": "end"}
        response = unpack(ask(f"{url}/v1/embeddings", body, Accept=MEDIA_TYPE).body)
        assert response.truncated == CUT
        object.__setattr__(response, "truncated", (5,))
        with pytest.raises(CorruptedAnswerError):
            unpack(pack(response))

    def test_a_server_that_reports_none_is_unknown(self) -> None:
        client = KalmClient(transport=ScriptedTransport(), model=MODEL, truncate="end")
        assert client.embed(["a"]).truncated is None
        assert client.with_options(truncate="error").embed(["a"]).truncated == ()

    def test_langchain_warns_once_per_call(self, caplog: pytest.LogCaptureFixture) -> None:
        embeddings = KalmModalEmbeddings(backend="local", truncate="end", batch_size=2)
        check_one_warning(caplog, lambda: embeddings.embed_documents(TEXTS))

    @pytest.mark.parametrize("cached", [False, True])  # LlamaIndex's own loop, in batches
    def test_llama_index_warns_once_per_call(
        self, cached: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = llama_index.KalmModalEmbeddings(
            backend="local",
            truncate="end",
            embed_batch_size=2,
            embeddings_cache=SimpleKVStore() if cached else None,
        )
        check_one_warning(caplog, lambda: model.get_text_embedding_batch(TEXTS))


def check_one_warning(caplog: pytest.LogCaptureFixture, embed: Any) -> None:
    with caplog.at_level(logging.WARNING, "kalm_integrations"):
        embed()
    (record,) = caplog.records
    assert "1, 4" in record.getMessage()
