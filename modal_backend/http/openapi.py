"""The OpenAPI document, built from the models of requests and responses."""

from __future__ import annotations

from functools import cache
from typing import Any, Final, Literal

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from kalm_integrations.codec import MEDIA_TYPE
from kalm_integrations.protocol import (
    ECHO_HEADER,
    IDENTITY_HEADER,
    REQUEST_ID_HEADER,
    TIMEOUT_HEADER,
    WARNING_HEADER,
)
from kalm_integrations.version import __version__
from modal_backend.http.metrics import CONTENT_TYPE
from modal_backend.http.responses import (
    Model,
    Models,
    OpenAIErrorBody,
    ResponseBody,
    Status,
    TokenCounts,
)
from modal_backend.http.schema import JSON, EmbeddingsBody
from modal_backend.service import MAX_TEXTS


class Embedding(ResponseBody):
    """The vector of one text."""

    object: Literal["embedding"]
    index: int
    """Index of the text in `input`."""
    embedding: list[float] | str
    """Numbers, or base64 of little-endian float32."""


class EmbeddingsUsage(ResponseBody):
    """The tokens that were computed."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(ResponseBody):
    """One vector for each text, in the order of `input`."""  # as `embeddings_json` writes them

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
    truncated: list[int]
    """Ours. Indices of the texts that were cut to the model's length, with `truncate="end"`."""


_MODELS: Final[list[tuple[type[BaseModel], JsonSchemaMode]]] = [
    (EmbeddingsBody, "validation"),
    *(
        (body, "serialization")
        for body in (Embeddings, TokenCounts, Models, Model, Status, OpenAIErrorBody)
    ),
]
_ERRORS: Final = {
    400: "The request is not valid; `code` and `message` tell why.",
    401: "The key is missing or wrong.",
    403: "The key is for queries only.",
    404: "The model is not served here.",
    413: "The body is too large, or has too many texts.",
    429: "The key has used its requests or tokens per minute.",
    500: "The service failed; its log has the request's id.",
    503: "The service cannot answer now.",
    504: "The deadline passed.",
}
_TEXT: Final = {"type": "string"}
_REQUEST_HEADERS: Final = {
    TIMEOUT_HEADER: ("Seconds that the caller waits.", {"type": "number", "exclusiveMinimum": 0}),
    # An unsafe id is replaced, not refused.
    REQUEST_ID_HEADER: ("Id of the request, repeated in the response.", _TEXT),
    ECHO_HEADER: ("The same, in a header that no proxy sets.", _TEXT),
}


def _header(description: str, *, required: bool = False) -> dict[str, Any]:
    return {"description": description, "required": required, "schema": _TEXT}


_RESPONSE_HEADERS: Final = {
    REQUEST_ID_HEADER: _header("The request's id, also in logs.", required=True),
    ECHO_HEADER: _header(f"The request's own {ECHO_HEADER}, if it has one."),
    IDENTITY_HEADER: _header("Fingerprint of the served space; absent if the service failed."),
    WARNING_HEADER: _header("Codes of the service's warnings; absent if there are none."),
}
_RETRY_HEADERS: Final = {
    "Retry-After": _header("Seconds after which to retry."),
    "Retry-After-Ms": _header("The same in milliseconds."),
}
_ERROR_HEADERS: Final = {
    401: {"WWW-Authenticate": _header("How to present a key.", required=True)},
    429: _RETRY_HEADERS,
    503: _RETRY_HEADERS,
}


@cache
def document() -> dict[str, Any]:
    """The OpenAPI document."""
    _, schemas = models_json_schema(_MODELS, ref_template="#/components/schemas/{model}")
    # The model accepts any value, so that errors can name invalid texts by index.
    text = _TEXT | {"minLength": 1, "pattern": r"\S"}
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": MAX_TEXTS}
    schemas["$defs"]["EmbeddingsBody"]["properties"]["input"] |= {"anyOf": [text, texts]}

    vectors = {JSON: _ref(Embeddings), MEDIA_TYPE: _TEXT | {"format": "binary"}}
    request = {
        "requestBody": {"required": True, "content": {JSON: {"schema": _ref(EmbeddingsBody)}}},
        "parameters": [
            {"name": name, "in": "header", "description": description, "schema": schema}
            for name, (description, schema) in _REQUEST_HEADERS.items()
        ],
    }
    health = _operation("Whether the process runs", {JSON: _ref(Status)})
    del health["responses"]["401"]
    model_id = {"name": "id", "in": "path", "required": True, "schema": _TEXT}
    model = _operation("The served model, by its name", {JSON: _ref(Model)}, 404)
    models = _operation("The served model", {JSON: _ref(Models)})
    roots = {"/v1": "", "/query/v1": " as queries", "/document/v1": " as documents"}
    errors = (400, 403, 404, 413, 429, 503, 504)
    counts = _operation("Count the tokens of texts", {JSON: _ref(TokenCounts)}, *errors) | request
    post = {f"{root}/count_tokens": counts for root in roots} | {
        f"{root}/embeddings": _operation(f"Embed texts{role}", vectors, *errors) | request
        for root, role in roots.items()
    }
    get = {
        **{f"{root}/models": models for root in roots},
        **{f"{root}/models/{{id}}": model | {"parameters": [model_id]} for root in roots},
        "/ready": _operation("Whether vectors are served", {JSON: _ref(Status)}, 503),
        "/metrics": _operation("Metrics for Prometheus", {CONTENT_TYPE: _TEXT}, 403),
        "/openapi.json": _operation("This document", {JSON: {"type": "object"}}),
        "/health": health | {"security": []},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Embeddings",
            "version": __version__,
            "description": "OpenAI's embeddings API with extensions. A field that is null counts "
            "as absent; an unknown field is refused.",
        },
        "security": [{"key": []}],
        "paths": {path: {"post": operation} for path, operation in post.items()}
        | {path: {"get": operation} for path, operation in get.items()},
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(summary: str, content: dict[str, Any], *errors: int) -> dict[str, Any]:
    responses = {
        str(status): {
            "description": _ERRORS[status],
            "headers": _RESPONSE_HEADERS | _ERROR_HEADERS.get(status, {}),
            "content": {JSON: {"schema": _ref(OpenAIErrorBody)}},
        }
        for status in (401, 500, *errors)
    }
    responses["200"] = {
        "description": "Success.",
        "headers": _RESPONSE_HEADERS,
        "content": {kind: {"schema": schema} for kind, schema in content.items()},
    }
    return {"summary": summary, "responses": responses}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
