"""The RPC endpoint: the methods of `VLLMEmbeddingSnapshot`, without Modal.

Arguments and results are built-in types only. Modal's client unpickles what a method returns or
raises, so callers need none of our classes, not even numpy.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar

from kalm_integrations import tracing, validation
from kalm_integrations.codec import pack
from kalm_integrations.errors import KalmError, TransportError
from kalm_integrations.protocol import EmbedRequest, EmbedResponse, default_role, error_fields
from kalm_integrations.version import __version__
from modal_backend.service import EmbeddingService

log = logging.getLogger(__name__)
T = TypeVar("T")


async def embed(service: EmbeddingService, sentences: list[str]) -> list[list[float]]:
    """Embed sentences as they are, without an instruction.

    Returns:
        One list of floats per sentence.

    Raises:
        RuntimeError: Any failure, with the code and message of our error.
    """
    role = default_role(sentences) if isinstance(sentences, list) else "document"
    try:
        response = await _embed(service, {"texts": sentences, "role": role, "dtype": "float32"})
    except KalmError as error:
        # Unpickling our own class would need this package, in this version.
        raise RuntimeError(f"{error.code}: {error}") from None
    vectors: list[list[float]] = response.vectors.tolist()
    return vectors


async def embed_with_metadata(
    service: EmbeddingService, sentences: list[str]
) -> list[dict[str, Any]]:
    """Like `embed`, with {"text", "embedding", "dimension"} for each sentence."""
    vectors = await embed(service, sentences)
    return [
        {"text": text, "embedding": vector, "dimension": len(vector)}
        for text, vector in zip(sentences, vectors, strict=True)
    ]


async def embed_packed(service: EmbeddingService, request: Mapping[str, Any]) -> dict[str, Any]:
    """Answer our client's request: {"packed": safetensors} or {"error": fields}; see `protocol`.

    Errors are returned as data, because Modal logs every exception.
    """
    try:
        return {"packed": pack(await _embed(service, request))}
    except KalmError as error:
        return {"error": error_fields(error)}


async def count_tokens(service: EmbeddingService, request: Mapping[str, Any]) -> dict[str, Any]:
    """Count the tokens of each text of a request of `embed_packed`: {"counts": [...]} or {"error":
    fields}."""
    try:
        return {"counts": await _answer(service.count_tokens, request)}
    except KalmError as error:
        return {"error": error_fields(error)}


def describe(
    service: EmbeddingService,
    phases: Mapping[str, float],
    *,
    restored: bool = False,
    engine_age: float = 0.0,
) -> dict[str, Any]:
    """Describe the service: version, warnings, how it started, and its identity and limits, or the
    error that keeps it from serving, as in `embed_packed`.

    Args:
        service: The service.
        phases: Seconds of each phase of the start.
        restored: Whether the container was restored from a snapshot.
        engine_age: Seconds from the end of the load to the start of this container.
    """
    description: dict[str, Any] = {
        "version": __version__,
        "phases": dict(phases),
        "restored": restored,
        "engine_age": engine_age,
        "warnings": [asdict(warning) for warning in service.warnings],
    }
    try:
        return description | {
            "identity": service.identity.to_dict(),
            "dimensions": list(service.dimensions),
            "max_tokens": service.max_tokens,
        }
    except KalmError as error:
        return description | {"error": error_fields(error)}


async def _embed(service: EmbeddingService, fields: Mapping[str, Any]) -> EmbedResponse:
    async def embed(request: EmbedRequest) -> EmbedResponse:
        with tracing.server_span(request.trace_context):
            return await service.embed(request)

    return await _answer(embed, fields)


async def _answer(method: Callable[[EmbedRequest], Awaitable[T]], fields: Mapping[str, Any]) -> T:
    """The answer of a method of the service to the request in `fields`.

    Raises:
        KalmError: Any failure, whatever the caller sent.
    """
    try:
        request = EmbedRequest.from_fields(fields)
        # A single string would be embedded as the list of its letters.
        texts: list[Any] = list(validation.check_collection(request.texts))
        return await method(replace(request, texts=texts))
    except KalmError:
        raise
    except Exception as error:
        log.exception("a request failed unexpectedly")
        raise TransportError(f"{type(error).__name__}: {error}.") from error
