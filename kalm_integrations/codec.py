"""Responses as bytes: safetensors with one tensor, which contain nothing executable.

The metadata has the digest of the request and a checksum of all other bytes, so that a response
that was swapped, duplicated, cut off or damaged is detected.
Source of the format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

import numpy as np
import xxhash

from kalm_integrations.errors import CorruptedAnswerError
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.protocol import EmbedResponse
from kalm_integrations.result import Usage

MEDIA_TYPE: Final = "application/vnd.safetensors"

_PART_BYTES: Final = 2**19
_HEAD_START: Final = b'{"__metadata__": {"checksum": "'
_DIGEST_KEY: Final = '", "digest": "'
_CHECKSUM: Final = slice(8 + len(_HEAD_START), 8 + len(_HEAD_START) + 16)
_DIGEST: Final = slice(_CHECKSUM.stop + len(_DIGEST_KEY), _CHECKSUM.stop + len(_DIGEST_KEY) + 32)
_SAFETENSORS: Final = {"float16": "F16", "float32": "F32"}
_DTYPES: Final[dict[str, np.dtype[np.floating[Any]]]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}


def pack(response: EmbedResponse) -> bytes:
    """Serialize `response`: tensor "vectors"; identity, usage, digest and checksum as metadata."""
    return b"".join(packed_parts(response))


def packed_parts(response: EmbedResponse) -> Iterator[bytes | memoryview]:
    """`pack` in parts of at most half a MiB; the vectors are not copied."""
    vectors = np.ascontiguousarray(response.vectors)
    metadata = {
        "checksum": "0" * 16,
        "digest": (response.digest or "").rjust(32, "-"),
        "usage.tokens": str(response.usage.tokens),
    }
    if response.truncated is not None:
        metadata["truncated"] = json.dumps(response.truncated)
    if response.identity is not None:
        metadata["identity"] = json.dumps(response.identity.to_dict())
    tensor = {
        "dtype": _SAFETENSORS[vectors.dtype.name],
        "shape": vectors.shape,
        "data_offsets": (0, vectors.nbytes),
    }
    head = json.dumps({"__metadata__": metadata, "vectors": tensor}).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    body = vectors.reshape(-1).view(np.uint8).data
    before, after = head[: _CHECKSUM.start], head[_CHECKSUM.stop :]
    yield before + _checksum(before, after, body) + after
    for start in range(0, len(body), _PART_BYTES):
        yield body[start : start + _PART_BYTES]


def unpack(body: bytes | bytearray | memoryview) -> EmbedResponse:
    """The inverse of `pack`. The vectors are a view of `body`.

    Args:
        body: Tracebacks with local variables show the contents of bytes, but not of a memoryview.

    Raises:
        CorruptedAnswerError: `body` is not what `pack` produces.
    """
    try:
        view = memoryview(body)
        checksum = _checksum(view[: _CHECKSUM.start], view[_CHECKSUM.stop :])
        if body[8 : _CHECKSUM.start] != _HEAD_START or body[_CHECKSUM] != checksum:
            raise ValueError("the checksum is missing or wrong")
        start = 8 + int.from_bytes(body[:8], "little")
        dtype, shape, identity, usage, truncated = _read_head(bytes(body[_DIGEST.stop : start]))
        size = shape[0] * shape[1]
        if len(body) != start + size * dtype.itemsize:
            raise ValueError(f"{len(body)} bytes")
        flat = np.frombuffer(body, dtype, offset=start) if size else np.empty(0, dtype)
        return EmbedResponse(
            vectors=flat.reshape(shape),
            identity=identity,
            usage=usage,
            digest=bytes(body[_DIGEST]).decode(),
            truncated=truncated,
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptedAnswerError(f"the response is not packed vectors ({error!r}).") from error


def _checksum(*parts: bytes | bytearray | memoryview) -> bytes:
    checksum = xxhash.xxh3_64()
    for part in parts:
        checksum.update(part)
    return checksum.hexdigest().encode()


_Head = tuple[
    np.dtype[np.floating[Any]],
    tuple[int, int],
    SpaceIdentity | None,
    Usage,
    tuple[int, ...] | None,
]


@lru_cache(maxsize=256)  # heads of queries differ only in their number of tokens
def _read_head(after_digest: bytes) -> _Head:
    head = json.loads(_HEAD_START + after_digest)
    tensor, metadata = head["vectors"], head["__metadata__"]
    dtype = _DTYPES[tensor["dtype"]]
    rows, columns = map(_natural, tensor["shape"])
    size = rows * columns * dtype.itemsize
    if tensor["data_offsets"] != [0, size] or len(head) != 2:
        raise ValueError(f"data_offsets {tensor['data_offsets']}")
    identity = _read_identity(metadata["identity"]) if "identity" in metadata else None
    usage = Usage(tokens=_natural(int(metadata["usage.tokens"])), requests=1)
    truncated = None
    if "truncated" in metadata:
        truncated = tuple(map(_natural, json.loads(metadata["truncated"])))
        if max(truncated, default=-1) >= rows:
            raise ValueError(f"truncated {truncated}")
    return dtype, (rows, columns), identity, usage, truncated


@lru_cache(maxsize=16)  # every response has the same one
def _read_identity(text: str) -> SpaceIdentity:
    return SpaceIdentity.from_dict(json.loads(text))


def _natural(number: object) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is not a number of rows, columns or tokens")
    return number
