"""The role of a request by its path or its model's name, for clients that send only OpenAI's
fields."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from chromadb.utils.embedding_functions import OpenAIEmbeddingFunction
from lancedb.embeddings import get_registry
from pydantic import SecretStr
from serving import embedded_engine, serving
from test_http_server import ask

from kalm_integrations import KalmClient
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.models import EMBEDDED
from modal_backend.engines.embedded import EmbeddedEngine
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.service import EmbeddingService

MODEL = EMBEDDED.space.model
TEXT, TEMPLATE = "How tall is K2?", "Search: {text}"
KEYS = ["correct-horse", "battery-staple"]


class Instructed(EmbeddedEngine):
    """The embedded engine, with a template for queries as KaLM has one."""

    query_template = TEMPLATE


def new_app() -> Any:
    real = embedded_engine()
    engine = Instructed(real._tokenizer, real._backend, real.identity)
    return create_app(EmbeddingService(engine), keys=BearerKeys([SecretStr(k) for k in KEYS]))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(new_app()) as url:
        yield url


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray[Any, Any]]:
    local = KalmClient(backend="local", vector_dtype="float32")
    return {
        "query": local.embed([TEMPLATE.format(text=TEXT)]).vectors[0],
        "document": local.embed([TEXT]).vectors[0],
    }


ROLES = pytest.mark.parametrize("role", ["query", "document"])


class TestOpenAIsClients:
    @ROLES
    def test_openai_by_path(self, url: str, expected: Any, role: str) -> None:
        with openai.OpenAI(base_url=f"{url}/{role}/v1", api_key=KEYS[0]) as client:
            answer = client.embeddings.create(input=TEXT, model=MODEL)
            assert np.allclose(answer.data[0].embedding, expected[role], atol=1e-6)
            assert [model.id for model in client.models.list()] == [MODEL]

    @ROLES
    def test_openai_by_model(self, url: str, expected: Any, role: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEYS[0]) as client:
            answer = client.embeddings.create(input=TEXT, model=f"{MODEL}:{role}")
            assert np.allclose(answer.data[0].embedding, expected[role], atol=1e-6)
            assert client.models.retrieve(f"{MODEL}:{role}").id == f"{MODEL}:{role}"

    @ROLES
    def test_chroma(self, url: str, expected: Any, role: str, monkeypatch: Any) -> None:
        monkeypatch.setenv("CHROMA_OPENAI_API_KEY", KEYS[0])
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        function = OpenAIEmbeddingFunction(model_name=MODEL, api_base=f"{url}/{role}/v1")
        assert np.allclose(function([TEXT]), [expected[role]], atol=1e-6)

    @ROLES
    def test_lancedb(self, url: str, expected: Any, role: str) -> None:
        get_registry().set_var("key", KEYS[0])
        function = get_registry().get("openai")
        function = function.create(name=MODEL, base_url=f"{url}/{role}/v1", api_key="$var:key")
        assert np.allclose(function.generate_embeddings([TEXT]), [expected[role]], atol=1e-6)


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("/query/v1", {"model": f"{MODEL}:document"}, ["/query/v1", ":document"]),
        ("/query/v1", {"input_type": "document"}, ["/query/v1", "input_type='document'"]),
        ("/v1", {"model": f"{MODEL}:query", "input_type": "document"}, [":query", "input_type="]),
        ("/document/v1", {"priority": "query"}, ["/document/v1", "priority='query'"]),
        ("/query/v1", {"priority": "query"}, ["/query/v1", "priority='query'"]),
        ("/v1", {"model": f"{MODEL}:query", "priority": "document"}, [":query", "priority="]),
    ],
)
def test_roles_that_disagree_are_refused(
    url: str, path: str, fields: dict[str, Any], named: list[str]
) -> None:
    answer = ask(f"{url}{path}/embeddings", {"input": TEXT, **fields})
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")
    assert all(name in answer.error["message"] for name in named)


def test_the_same_role_twice_applies_the_instruction_once(url: str, expected: Any) -> None:
    fields = {"input": TEXT, "model": f"{MODEL}:query", "input_type": "query"}
    answer = ask(f"{url}/query/v1/embeddings", fields)
    assert np.allclose(answer.json["data"][0]["embedding"], expected["query"], atol=1e-6)


def test_our_client_is_refused_there_since_it_adds_the_instruction_itself(url: str) -> None:
    with KalmClient(base_url=f"{url}/query/v1", api_key=KEYS[0], model=MODEL) as client:
        with pytest.raises(ConfigurationError, match="KalmClient"):
            client.embed([TEXT], role="query")


def test_a_wrong_path_under_a_role_names_the_right_one_of_that_role(url: str) -> None:
    assert "/query/v1/embeddings" in ask(f"{url}/query/embeddings").error["message"]
    assert "is /v1/embeddings" in ask(f"{url}/embeddings").error["message"]


def test_a_caller_that_names_no_role_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "modal_backend.http.roles"), serving(new_app()) as url:
        named = [{"input_type": "document"}, {"instruction": "Find: {text}"}, {"priority": "query"}]
        for fields in named:
            ask(f"{url}/v1/embeddings", {"input": TEXT, **fields})
        ask(f"{url}/query/v1/embeddings", {"input": TEXT})
        assert not caplog.records
        for key in (*KEYS, *KEYS):
            assert ask(f"{url}/v1/embeddings", {"input": TEXT}, key=key).status == 200
        assert len(caplog.records) == 2
        assert not any(key in caplog.text for key in KEYS)
