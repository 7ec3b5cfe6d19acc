"""The HTTP API as an OpenAPI document, built from the models that requests are parsed with."""

from __future__ import annotations

from functools import cache
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, JsonValue
from pydantic.json_schema import models_json_schema

from kalm_integrations.codec import MEDIA_TYPE
from kalm_integrations.protocol import (
    ECHO_HEADER,
    IDENTITY_HEADER,
    REQUEST_ID_HEADER,
    TIMEOUT_HEADER,
    WARNING_HEADER,
)
from kalm_integrations.version import __version__
from modal_backend.http.headers import JSON
from modal_backend.http.metrics import CONTENT_TYPE
from modal_backend.http.schema import EmbeddingsBody
from modal_backend.service import MAX_TEXTS


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Embedding(_Answer):
    """The vector of one text."""

    object: Literal["embedding"]
    index: int
    """Of the text in `input`."""
    embedding: list[float] | str
    """Numbers, or base64 of little-endian float32."""


class EmbeddingsUsage(_Answer):
    """What the model read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(_Answer):
    """One vector for each text, in the order of `input`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


class ServiceWarning(_Answer):
    """Something that an operator has to fix."""

    code: str
    """Stable; see docs/troubleshooting.md."""
    message: str


class Model(_Answer):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    identity: dict[str, JsonValue]
    """What makes its vectors comparable."""
    fingerprint: str
    """Of the identity."""
    dimensions: list[int]
    """The native number first."""
    max_tokens: int
    """Longest text."""
    warnings: list[ServiceWarning]
    """What an operator has to fix."""


class Models(_Answer):
    """The one model that is served."""

    object: Literal["list"]
    data: list[Model]


class Status(_Answer):
    """That all is well."""

    status: str


class InvalidText(_Answer):
    """A text that cannot be embedded."""

    index: int
    reason: str


class ErrorFields(_Answer):
    """OpenAI's fields, and two of ours: `invalid` and `retry_after`."""

    code: str
    """Stable; see docs/errors.md."""
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    invalid: list[InvalidText]
    """Texts that cannot be embedded, by their index in `input`."""
    retry_after: float | None
    """Seconds after which a retry may succeed, as in the header."""


class ErrorBody(_Answer):
    """An error."""

    error: ErrorFields


_MODELS: Final = (EmbeddingsBody, Embeddings, Models, Model, Status, ErrorBody)
_STATUSES: Final = {
    400: "The request cannot be answered as it is; `code` and `message` say why.",
    401: "No key, or a wrong one.",
    404: "The model is not served here.",
    413: "Too large a body, or too many texts.",
    500: "The service failed; its log has the request's id.",
    503: "The service cannot answer now.",
    504: "The deadline passed.",
}


@cache
def document() -> dict[str, Any]:
    """The OpenAPI document."""
    _, schemas = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template="#/components/schemas/{model}"
    )
    # The model says Any, because texts that cannot be embedded are named by their index.
    text = {"type": "string", "minLength": 1, "pattern": r"\S"}
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": MAX_TEXTS}
    body = schemas["$defs"]["EmbeddingsBody"]["properties"]
    body["input"] |= {"anyOf": [text, texts]}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Embeddings",
            "version": __version__,
            "description": "OpenAI's embeddings API with extensions. A field that is null counts "
            "as absent; a field that is unknown is refused.",
        },
        "security": [{"key": []}],
        "paths": {
            "/v1/embeddings": {"post": _embeddings()},
            "/v1/models": {"get": _get("The served model", "Models")},
            "/v1/models/{id}": {
                "get": _get("The served model, by its name", "Model", 404),
                "parameters": [
                    {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
                ],
            },
            "/ready": {"get": _get("Whether vectors are served", "Status", 503)},
            "/metrics": {"get": _metrics()},
            "/openapi.json": {"get": _operation("This document", {JSON: {"type": "object"}})},
            "/health": {"get": _health()},
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _embeddings() -> dict[str, Any]:
    vectors = {JSON: _ref("Embeddings"), MEDIA_TYPE: {"type": "string", "format": "binary"}}
    wait = {"type": "number", "exclusiveMinimum": 0}
    name = {"type": "string"}  # one that is no safe name is replaced, not refused
    return _operation("Embed texts", vectors, 400, 404, 413, 503, 504) | {
        "requestBody": {"required": True, "content": {JSON: {"schema": _ref("EmbeddingsBody")}}},
        "parameters": [
            _header(TIMEOUT_HEADER, "Seconds that the caller waits.", wait),
            _header(REQUEST_ID_HEADER, "Names the request; repeated in the answer.", name),
            _header(ECHO_HEADER, "The same, in a header that no proxy sets.", name),
        ],
    }


def _metrics() -> dict[str, Any]:
    return _operation("Metrics for Prometheus", {CONTENT_TYPE: {"type": "string"}})


def _health() -> dict[str, Any]:
    described = _get("Whether the process runs", "Status")
    del described["responses"]["401"]
    return described | {"security": []}


def _get(summary: str, schema: str, *statuses: int) -> dict[str, Any]:
    return _operation(summary, {JSON: _ref(schema)}, *statuses)


def _operation(summary: str, content: dict[str, Any], *statuses: int) -> dict[str, Any]:
    error = {JSON: {"schema": _ref("ErrorBody")}}
    responses: dict[str, Any] = {
        "200": {
            "description": "Done.",
            "headers": _answer_headers(),
            "content": {kind: {"schema": schema} for kind, schema in content.items()},
        }
    }
    for status in (401, 500, *statuses):
        headers = _answer_headers()
        if status == 401:
            headers["WWW-Authenticate"] = _described("How to present a key.", required=True)
        if status == 503:
            headers["Retry-After"] = _described("Seconds after which to try again.")
            headers["Retry-After-Ms"] = _described("The same in milliseconds.")
        responses[str(status)] = {
            "description": _STATUSES[status],
            "headers": headers,
            "content": error,
        }
    return {"summary": summary, "responses": responses}


def _answer_headers() -> dict[str, Any]:
    return {
        REQUEST_ID_HEADER: _described("The request's id, in logs too.", required=True),
        ECHO_HEADER: _described(f"The request's own {ECHO_HEADER}, if it has one."),
        IDENTITY_HEADER: _described("Fingerprint of the served space; none when it is broken."),
        WARNING_HEADER: _described("Codes of the service's warnings; none when all is well."),
    }


def _described(description: str, *, required: bool = False) -> dict[str, Any]:
    return {"description": description, "required": required, "schema": {"type": "string"}}


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": schema}


def _ref(model: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model}"}
