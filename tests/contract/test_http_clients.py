"""One running server: other clients get the same vectors as ours."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import trustme
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from pydantic import SecretStr
from scripted import vectors_of
from serving import FaultyServer, Received, embedded_engine, packed, serving

from kalm_integrations import KalmClient, KalmModalEmbeddings, llama_index
from kalm_integrations.errors import (
    AuthenticationError,
    ConfigurationError,
    ConnectionFailedError,
    IdentityMismatchError,
    InputTooLongError,
    NotFoundError,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import EMBEDDED
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.service import EmbeddingService

KEY = "correct-horse"
MODEL = EMBEDDED.space.model
TEXTS = ["K2 is 8,611 metres high.", "Brot geht auf.", "  two\n\nparagraphs ", "猫"]


@pytest.fixture(scope="module")
def app() -> Any:
    return create_app(EmbeddingService(embedded_engine()), keys=BearerKeys([SecretStr(KEY)]))


@pytest.fixture(scope="module")
def url(app: Any) -> Iterator[str]:
    with serving(app) as url:
        yield url


@pytest.fixture(scope="module")
def expected() -> np.ndarray[Any, Any]:
    return KalmClient(backend="local", vector_dtype="float32").embed(TEXTS).vectors


class TestOtherClients:
    def test_openai(self, url: str, expected: Any) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            answer = client.embeddings.create(input=TEXTS, model=MODEL)
            assert np.allclose([item.embedding for item in answer.data], expected, atol=1e-6)
            floats = client.embeddings.create(input=TEXTS, model=MODEL, encoding_format="float")
            assert np.allclose([item.embedding for item in floats.data], expected, atol=1e-6)
            assert (
                answer.usage.prompt_tokens == KalmClient(backend="local").embed(TEXTS).usage.tokens
            )
            assert [model.id for model in client.models.list()] == [MODEL]

    def test_openai_async(self, url: str, expected: Any) -> None:
        async def main() -> Any:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
                return await client.embeddings.create(input=TEXTS, model=MODEL)

        answer = asyncio.run(main())
        assert np.allclose([item.embedding for item in answer.data], expected, atol=1e-6)

    def test_openais_errors(self, url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError, match="bearer key is missing or wrong"):
                client.embeddings.create(input="a", model=MODEL)
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            with pytest.raises(openai.BadRequestError, match=r"texts\[1\] is empty") as caught:
                client.embeddings.create(input=["a", ""], model=MODEL)
            assert (caught.value.code, caught.value.param) == ("invalid_input", "input[1]")
            with pytest.raises(openai.NotFoundError, match="is not served here"):
                client.embeddings.create(input="a", model="text-embedding-3-large")

    def test_langchain_openai(self, url: str, expected: Any) -> None:
        embeddings = OpenAIEmbeddings(
            base_url=f"{url}/v1", api_key=KEY, model=MODEL, check_embedding_ctx_length=False
        )
        assert np.allclose(embeddings.embed_documents(TEXTS), expected, atol=1e-6)
        assert np.allclose(embeddings.embed_query(TEXTS[0]), expected[0], atol=1e-6)

    def test_llama_index_openai_like(self, url: str, expected: Any) -> None:
        model = OpenAILikeEmbedding(model_name=MODEL, api_base=f"{url}/v1", api_key=KEY)
        # It rewrites newlines to spaces, which is why ours is better: compare without them.
        plain = [0, 1, 3]
        texts = [TEXTS[i] for i in plain]
        assert np.allclose(model.get_text_embedding_batch(texts), expected[plain], atol=1e-6)

    @pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
    def test_curl(self, url: str, expected: Any) -> None:
        import json

        body = json.dumps({"input": TEXTS, "model": MODEL})
        headers = ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
        done = subprocess.run(
            ["curl", "-sS", f"{url}/v1/embeddings", *headers, "-d", body],
            check=True,
            capture_output=True,
        )
        rows = [item["embedding"] for item in json.loads(done.stdout)["data"]]
        assert np.allclose(rows, expected, atol=1e-6)


class TestOurClients:
    @pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
    def test_base_url_with_and_without_v1(self, url: str, expected: Any, suffix: str) -> None:
        with KalmClient(base_url=url + suffix, api_key=KEY, model=MODEL) as client:
            result = client.embed(TEXTS)
            assert np.allclose(result.vectors, expected, atol=1e-3)
            assert result.identity.space == EMBEDDED.space
            assert result.usage.tokens == KalmClient(backend="local").embed(TEXTS).usage.tokens

    def test_both_adapters_sync_and_async(self, url: str, expected: Any) -> None:
        settings: dict[str, Any] = {"base_url": url, "api_key": KEY, "model": MODEL}
        with KalmModalEmbeddings(**settings, vector_dtype="float32") as langchain:
            assert np.allclose(langchain.embed_documents(TEXTS), expected, atol=1e-6)
            assert np.allclose(asyncio.run(langchain.aembed_documents(TEXTS)), expected, atol=1e-6)
        with llama_index.KalmModalEmbeddings(**settings) as model:
            assert np.allclose(model.get_text_embedding_batch(TEXTS), expected, atol=1e-3)
            assert np.allclose(
                asyncio.run(model.aget_query_embedding(TEXTS[0])), expected[0], atol=1e-3
            )

    def test_the_environment_configures_the_client(
        self, url: str, expected: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {"BASE_URL": url, "API_KEY": KEY, "MODEL": MODEL}.items():
            monkeypatch.setenv(f"KALM_{name}", value)
        with KalmClient() as client:
            assert np.allclose(client.embed(TEXTS).vectors, expected, atol=1e-3)
            assert KEY not in repr(client) + str(client.config.model_dump())

    def test_role_timeout_and_credentials_are_sent(self, url: str) -> None:
        with (
            FaultyServer() as server,
            KalmClient(
                base_url=server.url, model=MODEL, modal_key="id", modal_secret="secret"
            ) as client,
        ):
            client.embed(["q"], role="query")
            client.embed(["d"])
            query, document = server.posted
        assert b'"priority": "query"' in query.body
        assert b'"priority": "document"' in document.body
        assert 590 < float(document.headers["x-kalm-timeout"]) <= 600
        assert (query.headers["modal-key"], query.headers["modal-secret"]) == ("id", "secret")
        assert "authorization" not in query.headers

    def test_connections_are_reused(self, app: Any) -> None:
        with FaultyServer() as server, KalmClient(base_url=server.url, model=MODEL) as client:
            for i in range(5):
                client.embed([f"text {i}", "b"])
                client.embed([f"text {i}"])
            assert len(server._tasks) == 1

    def test_a_connection_closed_by_the_server_is_replaced_without_a_retry(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def answer_and_close(request: Received, writer: asyncio.StreamWriter) -> None:
            await packed()(request, writer)
            asyncio.get_running_loop().call_later(0.05, writer.close)

        with FaultyServer([answer_and_close] * 9) as server:
            with KalmClient(base_url=server.url, model=MODEL) as client:
                for i in range(4):
                    client.embed([f"text {i}"])
                    for _ in range(500):
                        if not server._tasks:
                            break
                        time.sleep(0.01)
                    assert not server._tasks
            assert len(server.posted) == 4
        assert not caplog.records  # no retry

    def test_connections_close_when_the_client_is_collected(self) -> None:
        with FaultyServer() as server:
            client = KalmClient(base_url=server.url, model=MODEL)
            client.embed(["a"])
            assert len(server._tasks) == 1
            del client
            gc.collect()
            for _ in range(200):
                if not server._tasks:
                    break
                time.sleep(0.01)
            assert not server._tasks

    def test_a_script_without_close_exits_quietly(self) -> None:
        with FaultyServer() as server:
            code = (
                "from kalm_integrations import KalmClient\n"
                f"client = KalmClient(base_url={server.url!r}, model={MODEL!r})\n"
                "print(client.embed(['a']).vectors.shape)"
            )
            done = subprocess.run(
                [sys.executable, "-W", "error", "-c", code],
                check=False,
                capture_output=True,
                text=True,
            )
        assert (done.stdout, done.stderr) == ("(1, 512)\n", "")

    def test_a_text_rejected_by_the_engine_is_named_by_index(self, url: str) -> None:
        with KalmClient(base_url=url, api_key=KEY, model=MODEL, batch_size=2) as client:
            texts = ["a", "b", "c", "word " * 15_000]
            with pytest.raises(InputTooLongError) as caught:
                client.embed(texts)
            assert [bad.index for bad in caught.value.invalid] == [3]
            parts = list(client.iter_embed(texts, on_error="skip"))
            assert sorted(i for part in parts for i, _ in part) == [0, 1, 2]

    def test_a_wrong_key_is_an_authentication_error(self, url: str) -> None:
        with KalmClient(base_url=url, api_key="wrong", model=MODEL) as client:
            with pytest.raises(AuthenticationError, match="KALM_API_KEY"):
                client.embed(["a"])

    def test_kalm_is_the_default_model(self, url: str) -> None:
        with KalmClient(base_url=url, api_key=KEY) as client:
            with pytest.raises(IdentityMismatchError, match="expected tencent/KaLM"):
                client.warm_up()
            with pytest.raises((IdentityMismatchError, NotFoundError)):
                client.embed(["a"])

    def test_warm_up_returns_the_identity(self, url: str) -> None:
        with KalmClient(base_url=url, api_key=KEY, model=MODEL) as client:
            assert client.warm_up().space == EMBEDDED.space


class TestPlainServers:
    def test_vectors_are_accepted_with_one_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        with (
            FaultyServer(ours=False) as server,
            KalmClient(base_url=server.url, model="some/model", batch_size=2) as client,
        ):
            result = client.embed(TEXTS)
            assert np.array_equal(result.vectors, vectors_of(TEXTS))
            assert result.identity.space == SpaceIdentity.undeclared("some/model")
            assert caplog.text.count("unverified") == 1
            sent = server.posted[0].body
        assert b"base64" in sent
        for ours in (b"truncate", b"priority", b"embed_dtype"):
            assert ours not in sent

    def test_an_expected_identity_is_an_error(self) -> None:
        with (
            FaultyServer(ours=False) as server,
            KalmClient(
                base_url=server.url, model=MODEL, expected_identity=EMBEDDED.space
            ) as client,
            pytest.raises(IdentityMismatchError, match="reports no identity"),
        ):
            client.embed(TEXTS)

    def test_no_texts_of_an_unknown_model_have_no_dimensions(self) -> None:
        with KalmClient(base_url="http://127.0.0.1:9", model="some/model") as client:
            assert client.embed([]).vectors.shape == (0, 0)


class TestNetwork:
    def test_a_private_certificate_authority(
        self, app: Any, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        chain, key, root = (tmp_path / name for name in ("chain.pem", "key.pem", "root.pem"))
        certificate.private_key_pem.write_to_path(key)
        for blob in certificate.cert_chain_pems:
            blob.write_to_path(chain, append=True)
        authority.cert_pem.write_to_path(root)
        with serving(app, ssl_certfile=str(chain), ssl_keyfile=str(key)) as url:
            with KalmClient(base_url=url, api_key=KEY, model=MODEL) as untrusting:
                with pytest.raises(ConfigurationError, match="SSL_CERT_FILE"):
                    untrusting.embed(TEXTS)
            monkeypatch.setenv("SSL_CERT_FILE", str(root))
            assert ssl.get_default_verify_paths().openssl_cafile_env == "SSL_CERT_FILE"
            with KalmClient(base_url=url, api_key=KEY, model=MODEL) as client:
                assert np.allclose(client.embed(TEXTS).vectors, expected, atol=1e-3)

    def test_https_to_a_plain_http_server_is_a_configuration_error(self, app: Any) -> None:
        with serving(app) as url:
            safe = url.replace("http://", "https://")
            with KalmClient(base_url=safe, model=MODEL) as client:
                with pytest.raises(ConfigurationError, match="begins with http://"):
                    client.embed(TEXTS)

    def test_proxies_of_the_environment_are_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with FaultyServer() as proxy:
            monkeypatch.setenv("HTTP_PROXY", proxy.url)
            monkeypatch.setenv("http_proxy", proxy.url)
            for name in ("NO_PROXY", "no_proxy"):
                monkeypatch.delenv(name, raising=False)
            with KalmClient(base_url="http://kalm.invalid", model=MODEL) as client:
                assert np.array_equal(client.embed(TEXTS).vectors, vectors_of(TEXTS))
            assert proxy.posted[0].path == "http://kalm.invalid/v1/embeddings"
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            with FaultyServer() as server, KalmClient(base_url=server.url, model=MODEL) as client:
                client.embed(["direct"])
                assert len(server.posted) == 1

    def test_an_unknown_host_is_a_connection_error(self) -> None:
        with KalmClient(base_url="http://kalm.invalid", model=MODEL, max_retries=0) as client:
            with pytest.raises(ConnectionFailedError, match=r"kalm\.invalid"):
                client.embed(TEXTS)
        assert "HTTP_PROXY" not in os.environ
