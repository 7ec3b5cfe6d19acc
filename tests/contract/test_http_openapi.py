"""The OpenAPI document is the API's: generated requests get the answers that it describes."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from pydantic import SecretStr
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import embedded_engine, serving
from test_http_server import KEY, ask

from kalm_integrations.protocol import TIMEOUT_HEADER
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.http.openapi import document
from modal_backend.http.schema import EmbeddingsBody
from modal_backend.service import EmbeddingService


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    service = EmbeddingService(embedded_engine())
    with serving(create_app(service, keys=BearerKeys([SecretStr(KEY)]))) as url:
        yield url


def test_the_document_needs_the_key(url: str) -> None:
    assert ask(f"{url}/openapi.json", key=None).status == 401
    assert ask(f"{url}/openapi.json").json == document()


def test_every_field_of_a_request_is_described() -> None:
    described = document()["components"]["schemas"]["EmbeddingsBody"]
    assert described["properties"].keys() == EmbeddingsBody.model_fields.keys()
    assert all("description" in field for field in described["properties"].values())
    assert described["additionalProperties"] is False


VALID, INVALID = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [
    (path, method, mode)
    for path, operations in document()["paths"].items()
    for method in sorted({"get", "post"} & operations.keys())
    for mode in ((VALID, INVALID) if method == "post" else (VALID,))
]


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_generated_requests_get_the_described_responses(
    url: str, path: str, method: str, mode: GenerationMode
) -> None:
    """Status, headers and body are as described; nothing is a server's error; what the schema
    rules out is refused. The reverse is not checked: that a preset exists is no matter of types."""
    schema = schemathesis.openapi.from_dict(document())
    schema.config.update(base_url=url)

    @hypothesis.settings(
        max_examples=40 if method == "post" else 5,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=schema[path][method].as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        if mode == VALID:
            headers[TIMEOUT_HEADER] = "60"  # a valid one may be too short for any answer
        answer = case.call(headers=headers)
        case.validate_response(answer, headers=headers, excluded_checks=[positive_data_acceptance])
        answers.append(answer.status_code)

    answers: list[int] = []
    check()
    assert answers
    if method == "post" and mode == VALID:
        assert 200 in answers
