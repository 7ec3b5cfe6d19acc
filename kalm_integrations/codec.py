"""What travels between a client and a service, over HTTP and RPC alike.

Vectors travel as safetensors: a standard of the field, compact, nothing executable in it. The
metadata says which request they answer and has a checksum over all other bytes, so that an answer
that was swapped, delivered twice, cut off or damaged on its way is not taken for the right one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Final, Literal, get_args

import numpy as np
import xxhash
from numpy.typing import NDArray

from kalm_integrations.errors import (
    ConfigurationError,
    CorruptedAnswerError,
    InvalidInputError,
    InvalidResponseError,
    InvalidText,
    KalmError,
    ServiceUnavailableError,
    TransportError,
    by_code,
)
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.prompts import Role
from kalm_integrations.result import Usage

Truncate = Literal["error", "end"]
VectorDtype = Literal["float16", "float32"]
Vectors = NDArray[np.floating[Any]]
"""Shape (texts, dimensions), float16 or float32, one unit vector a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """One request.

    Attributes:
        texts: The texts as the model shall see them, instructions set in.
        role: Queries go before documents in the engine.
        dimensions: Asked for, or None for the model's own.
        truncate: What to do with a text over the model's length.
        dtype: Type of the answer's vectors.
        timeout: Seconds that the caller still waits: what has not started by then is dropped.
    """

    texts: list[str]
    role: Role
    dimensions: int | None = None
    truncate: Truncate = "error"
    dtype: VectorDtype = "float16"
    timeout: float | None = None

    def digest(self) -> str:
        """A digest of all that decides what the vectors are, and of their order.

        xxh3 is no cryptographic hash: it finds mix-ups, not forgeries, which TLS prevents. It
        takes 0.1 ms where BLAKE2 takes 2.
        """
        lengths = ",".join(map(str, map(len, self.texts)))
        head = f"{self.role} {self.dimensions} {self.truncate} {lengths} "
        digest = xxhash.xxh3_128(head.encode())
        # Lone surrogates are for the service to refuse.
        digest.update("".join(self.texts).encode(errors="surrogatepass"))
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedAnswer:
    """One answer: `vectors[i]` is of `request.texts[i]`.

    Attributes:
        vectors: One unit vector a text.
        identity: The space of the vectors; None for a service that reports none.
        usage: What the request cost.
        digest: `EmbedRequest.digest` of the request as the service read it; None for a service
            that reports none.
    """

    vectors: Vectors
    identity: SpaceIdentity | None
    usage: Usage
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class ServiceWarning:
    """Something that an operator has to fix, though vectors are served.

    Attributes:
        code: A stable name; docs/troubleshooting.md lists them.
        message: What happened, and what it means.
    """

    code: str
    message: str


MEDIA_TYPE: Final = "application/vnd.safetensors"
IDENTITY_HEADER: Final = "X-Kalm-Identity"
"""Fingerprint of the served space, on every HTTP answer."""
TIMEOUT_HEADER: Final = "X-Kalm-Timeout"
"""Seconds that an HTTP caller still waits."""
REQUEST_ID_HEADER: Final = "X-Request-Id"
"""Names a request in logs, on both sides and at proxies in between, some of which set their own."""
ECHO_HEADER: Final = "X-Kalm-Request-Id"
"""The same id in a header that no proxy sets: an answer must have its request's."""
WARNING_HEADER: Final = "X-Kalm-Warning"
"""Codes of the service's warnings, with commas between them; absent when there is none."""


def pack(answer: EmbedAnswer) -> bytes:
    """`answer` as safetensors: tensor "vectors"; identity, usage, digest and checksum in the
    metadata."""
    return b"".join(packed_parts(answer))


def packed_parts(answer: EmbedAnswer) -> Iterator[bytes | memoryview]:
    """`pack` in parts of at most a MiB, the vectors uncopied.

    Source of the format: https://huggingface.co/docs/safetensors.
    """
    vectors = np.ascontiguousarray(answer.vectors)
    metadata = {
        "checksum": "0" * 16,
        "digest": (answer.digest or "").rjust(32, "-"),
        "usage.tokens": str(answer.usage.tokens),
    }
    if answer.identity is not None:
        metadata["identity"] = json.dumps(answer.identity.to_dict())
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
    for start in range(0, len(body), _PART):
        yield body[start : start + _PART]


def unpack(body: bytes | bytearray) -> EmbedAnswer:
    """The inverse of `pack`. The vectors are a view of `body`.

    Raises:
        CorruptedAnswerError: `body` is not what `pack` makes: damaged, cut off, of another type,
            not safetensors at all. Nothing in it is ever executed.
    """
    try:
        view = memoryview(body)
        checksum = _checksum(view[: _CHECKSUM.start], view[_CHECKSUM.stop :])
        if body[8 : _CHECKSUM.start] != _HEAD_START or body[_CHECKSUM] != checksum:
            raise ValueError("no checksum, or another one")
        start = 8 + int.from_bytes(body[:8], "little")
        head = _read_head(bytes(body[_DIGEST.stop : start]))
        if len(body) != start + head.size:
            raise ValueError(f"{len(body)} bytes")
        flat = (
            np.frombuffer(body, head.dtype, offset=start) if head.size else np.empty(0, head.dtype)
        )
        return EmbedAnswer(
            vectors=flat.reshape(head.rows, head.columns),
            identity=head.identity,
            usage=head.usage,
            digest=body[_DIGEST].decode(),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptedAnswerError(f"the answer is not packed vectors ({error!r}).") from error


def _checksum(*parts: bytes | bytearray | memoryview) -> bytes:
    checksum = xxhash.xxh3_64()
    for part in parts:
        checksum.update(part)
    return checksum.hexdigest().encode()


@dataclass(frozen=True, slots=True)
class _Head:
    dtype: np.dtype[np.floating[Any]]
    rows: int
    columns: int
    size: int
    identity: SpaceIdentity | None
    usage: Usage


@lru_cache(maxsize=256)  # those of queries differ in their number of tokens only
def _read_head(after_digest: bytes) -> _Head:
    head = json.loads(_HEAD_START + after_digest)
    tensor, metadata = head["vectors"], head["__metadata__"]
    dtype = _DTYPES[tensor["dtype"]]
    rows, columns = map(_natural, tensor["shape"])
    size = rows * columns * dtype.itemsize
    if tensor["data_offsets"] != [0, size] or len(head) != 2:
        raise ValueError(f"data_offsets {tensor['data_offsets']}")
    identity = metadata.get("identity")
    return _Head(
        dtype,
        rows,
        columns,
        size,
        None if identity is None else _identity(identity),
        Usage(tokens=_natural(int(metadata["usage.tokens"])), requests=1),
    )


@lru_cache(maxsize=16)  # every answer has the same
def _identity(written: str) -> SpaceIdentity:
    return SpaceIdentity.from_dict(json.loads(written))


def _natural(number: object) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is no number of rows, columns or tokens")
    return number


def request_fields(request: EmbedRequest) -> dict[str, Any]:
    """`request` as Modal's argument: built-in types only, as all that crosses a pickle here."""
    return asdict(request)


def read_request(given: Mapping[str, Any]) -> EmbedRequest:
    """The inverse of `request_fields`, of what a stranger may have sent.

    Raises:
        ConfigurationError: It is not a request of this version.
    """
    known = {field.name for field in fields(EmbedRequest)}
    if not isinstance(given, Mapping) or not {"texts", "role"} <= given.keys() <= known:
        raise ConfigurationError(f"a request has texts and role, and may have {sorted(known)}.")
    for name, allowed in _VALUES.items():
        if given.get(name, allowed[0]) not in allowed:
            raise ConfigurationError(f"{name}={given[name]!r}: it is one of {allowed}.")
    return EmbedRequest(**given)


def error_fields(error: KalmError) -> dict[str, Any]:
    """`error` as data: built-in types only, so that whoever receives it needs none of our classes.
    Without the remedy, which is for Python callers: they get it from the class."""
    described: dict[str, Any] = {"code": error.code, "message": error.message}
    if isinstance(error, InvalidInputError | InvalidResponseError):
        described["invalid"] = [{"index": bad.index, "reason": bad.reason} for bad in error.invalid]
    if isinstance(error, ServiceUnavailableError):
        described["retry_after"] = error.retry_after
    return described


def read_error(described: Mapping[str, Any]) -> KalmError:
    """The inverse of `error_fields`."""
    kind = by_code(described.get("code")) or TransportError
    message = str(described.get("message", "")).strip()
    if issubclass(kind, InvalidInputError | InvalidResponseError):
        listed = described.get("invalid") or []
        invalid = [InvalidText(int(bad["index"]), str(bad["reason"])) for bad in listed]
        return kind.of(invalid) if invalid else kind(message)
    if issubclass(kind, ServiceUnavailableError):
        after = described.get("retry_after")
        return kind(message, after if isinstance(after, int | float) else None)
    return kind(message)


def read_warnings(described: object) -> tuple[ServiceWarning, ...]:
    """The warnings of a description; none where it is of a service that reports none."""
    listed = described.get("warnings") if isinstance(described, Mapping) else None
    return tuple(
        ServiceWarning(str(each.get("code", "")), str(each.get("message", "")))
        for each in (listed if isinstance(listed, list) else [])
        if isinstance(each, Mapping)
    )


_VALUES: Final[dict[str, tuple[str, ...]]] = {
    "role": get_args(Role),
    "truncate": get_args(Truncate),
    "dtype": get_args(VectorDtype),
}
_PART: Final = 2**19
_HEAD_START: Final = b'{"__metadata__": {"checksum": "'
_DIGEST_KEY: Final = '", "digest": "'
# Where an answer has its checksum, and the digest of its request.
_CHECKSUM: Final = slice(8 + len(_HEAD_START), 8 + len(_HEAD_START) + 16)
_DIGEST: Final = slice(_CHECKSUM.stop + len(_DIGEST_KEY), _CHECKSUM.stop + len(_DIGEST_KEY) + 32)
_SAFETENSORS: Final = {"float16": "F16", "float32": "F32"}
_DTYPES: Final[dict[str, np.dtype[np.floating[Any]]]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}
