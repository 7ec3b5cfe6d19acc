"""The RPC door: what `VLLMEmbeddingSnapshot`'s methods do, without Modal.

Arguments and answers are built-in types only. Modal's client unpickles what a method returns or
raises; a caller needs none of our classes for it, not even numpy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from kalm_integrations import validation
from kalm_integrations.codec import pack
from kalm_integrations.errors import KalmError, TransportError
from kalm_integrations.prompts import Role
from kalm_integrations.protocol import EmbedRequest, EmbedResponse, error_fields
from kalm_integrations.version import __version__
from modal_backend.service import EmbeddingService

log = logging.getLogger(__name__)


async def embed(service: EmbeddingService, sentences: list[str]) -> list[list[float]]:
    """Vectors as lists of floats; no instruction is added.

    Raises:
        RuntimeError: Whatever failed, with our error's code and message.
    """
    role: Role = "query" if isinstance(sentences, list) and len(sentences) == 1 else "document"
    try:
        answer = await _answer(service, {"texts": sentences, "role": role, "dtype": "float32"})
    except KalmError as error:
        # Ours would need this package, in this version, to be unpickled.
        raise RuntimeError(f"{error.code}: {error}") from None
    vectors: list[list[float]] = answer.vectors.tolist()
    return vectors


async def embed_with_metadata(
    service: EmbeddingService, sentences: list[str]
) -> list[dict[str, Any]]:
    """`embed`, one {"text", "embedding", "dimension"} for each sentence."""
    vectors = await embed(service, sentences)
    return [
        {"text": text, "embedding": vector, "dimension": len(vector)}
        for text, vector in zip(sentences, vectors, strict=True)
    ]


async def embed_packed(service: EmbeddingService, request: Mapping[str, Any]) -> dict[str, Any]:
    """What our client calls: {"packed": safetensors} or {"error": fields}; see `wire`.

    Errors travel as data: an exception would be logged by every hand it passes through.
    """
    try:
        return {"packed": pack(await _answer(service, request))}
    except KalmError as error:
        return {"error": error_fields(error)}


def describe(
    service: EmbeddingService,
    phases: Mapping[str, float],
    *,
    restored: bool = False,
    engine_age: float = 0.0,
) -> dict[str, Any]:
    """Describe the service: identity, limits, version, warnings, and how it started; or an error,
    as `embed_packed`.

    Args:
        service: What serves.
        phases: Seconds of each phase of the start.
        restored: Whether the container was restored from a snapshot.
        engine_age: Seconds from the end of the load to the start of this container.
    """
    described: dict[str, Any] = {
        "version": __version__,
        "phases": dict(phases),
        "restored": restored,
        "engine_age": engine_age,
        "warnings": [asdict(warning) for warning in service.warnings],
    }
    try:
        return described | {
            "identity": service.identity.to_dict(),
            "dimensions": list(service.dimensions),
            "max_tokens": service.max_tokens,
        }
    except KalmError as error:
        return described | {"error": error_fields(error)}


async def _answer(service: EmbeddingService, fields: Mapping[str, Any]) -> EmbedResponse:
    """The response to the request in `fields`.

    Raises:
        KalmError: Always one of these, whatever a stranger sent and whatever broke.
    """
    try:
        request = EmbedRequest.from_fields(fields)
        # A single string would pass for the list of its letters.
        texts: list[Any] = list(validation.check_collection(request.texts))
        return await service.embed(replace(request, texts=texts))
    except KalmError:
        raise
    except Exception as error:
        log.exception("a request broke")
        raise TransportError(f"{type(error).__name__}: {error}.") from error
