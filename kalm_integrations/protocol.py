"""Requests, responses and errors as they travel between a client and a service.

`codec` serializes a response. HTTP carries everything else as JSON, RPC as built-in types, so that
callers need none of these classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal, Self

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    SkipValidation,
    StrictFloat,
    StrictInt,
    TypeAdapter,
    ValidationError,
)

from kalm_integrations.errors import (
    ConfigurationError,
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
"""Shape (texts, dimensions), float16 or float32, one unit vector per row."""

IDENTITY_HEADER: Final = "X-Kalm-Identity"
"""Fingerprint of the served space, on every HTTP response."""
TIMEOUT_HEADER: Final = "X-Kalm-Timeout"
"""Seconds that the HTTP caller still waits."""
REQUEST_ID_HEADER: Final = "X-Request-Id"
"""Id of a request in the logs of client, service and proxies; some proxies replace it."""
ECHO_HEADER: Final = "X-Kalm-Request-Id"
"""The same id in a header that no proxy sets; the response repeats it."""
WARNING_HEADER: Final = "X-Kalm-Warning"
"""Codes of the service's warnings, separated by commas; absent when there is none."""


def default_role(texts: Sized) -> Role:
    """The role of texts whose caller names none: a single text is a query."""
    return "query" if len(texts) == 1 else "document"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """One request.

    Attributes:
        texts: The texts as the model sees them, with instructions applied.
        role: Queries go before documents. The service treats a request of over 8,192 characters as
            documents.
        dimensions: Requested dimensions; None for the model's native number.
        truncate: What to do with a text longer than the model reads.
        dtype: Type of the vectors in the response.
        timeout: Seconds that the caller still waits; work that has not started by then is dropped.
        trace_context: Over RPC, W3C's `traceparent` and `tracestate`.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    texts: SkipValidation[list[str]]
    role: Role
    dimensions: StrictInt | None = None
    truncate: Truncate = "error"
    dtype: VectorDtype = "float16"
    timeout: StrictFloat | None = None
    trace_context: dict[str, str] | None = None

    @classmethod
    def from_fields(cls, fields: object) -> Self:
        """The inverse of `dataclasses.asdict`, for untrusted fields. Does not check the texts.

        Raises:
            ConfigurationError: These are not the fields of a request of this version.
        """
        if not isinstance(fields, Mapping):
            raise ConfigurationError("a request is a mapping with texts and role.")
        try:
            request: Self = _request_adapter().validate_python(fields)
            return request
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ConfigurationError(f"{first['loc'][0]}: {first['msg']}.") from None

    def digest(self) -> str:
        """A digest of everything that determines the vectors and their order.

        xxh3 detects mix-ups, not forgeries, which TLS prevents. It takes 0.1 ms; BLAKE2 takes 2 ms.
        """
        lengths = ",".join(map(str, map(len, self.texts)))
        head = f"{self.role} {self.dimensions} {self.truncate} {lengths} "
        digest = xxhash.xxh3_128(head.encode())
        # The service rejects lone surrogates by index; the digest must not fail before that.
        digest.update("".join(self.texts).encode(errors="surrogatepass"))
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedResponse:
    """One response: `vectors[i]` belongs to `request.texts[i]`.

    Attributes:
        vectors: One unit vector per text.
        identity: The space of the vectors; None if the service reports none.
        usage: Tokens that were computed.
        digest: `EmbedRequest.digest` of the request as the service received it; None if the
            service reports none.
        truncated: Indices of the texts that were cut; None if the service reports none.
    """

    vectors: Vectors
    identity: SpaceIdentity | None
    usage: Usage
    digest: str | None = None
    truncated: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class ServiceWarning:
    """A problem that an operator has to fix, although vectors are served."""

    code: str
    """Stable name; docs/troubleshooting.md lists them."""
    message: str


@dataclass(frozen=True, slots=True)
class ServiceDescription:
    """What a service reports about itself."""

    identity: SpaceIdentity | None
    """The space that it serves; None if it reports none."""
    warnings: tuple[ServiceWarning, ...] = ()


class ErrorBody(BaseModel):
    """How a service reports an error, over HTTP and RPC."""

    model_config = ConfigDict(frozen=True)

    code: str
    """Stable name of the error; `errors` has the table."""
    message: str
    """What happened and which input is concerned, without advice for Python callers."""
    invalid: tuple[InvalidText, ...] = ()
    """The texts that cannot be embedded, by index within the request."""
    retry_after: float | None = None
    """Seconds after which a retry may succeed; HTTP's header `Retry-After` takes precedence."""

    def to_error(self, kind: type[KalmError] | None = None) -> KalmError:
        """The error that this body describes, of class `kind` or of the class of its code;
        `TransportError` for an unknown code."""
        kind = kind or by_code(self.code) or TransportError
        message = self.message.strip()
        if issubclass(kind, InvalidInputError | InvalidResponseError):
            return kind.of(self.invalid) if self.invalid else kind(message)
        if issubclass(kind, ServiceUnavailableError):
            return kind(message, self.retry_after)
        return kind(message)


def error_fields(error: KalmError) -> dict[str, Any]:
    """`error` as `ErrorBody`, in built-in types."""
    return ErrorBody(
        code=error.code,
        message=error.message,
        invalid=getattr(error, "invalid", ()),
        retry_after=getattr(error, "retry_after", None),
    ).model_dump(mode="json")


def error_from_fields(fields: object) -> KalmError:
    """The error in `fields`, which a service sent as `ErrorBody`."""
    try:
        return ErrorBody.model_validate(fields).to_error()
    except ValidationError:
        return TransportError(f"the service reported an error that cannot be read: {fields!r:.200}")


def read_warnings(description: object) -> tuple[ServiceWarning, ...]:
    """The warnings in a service's description; none if it reports none."""
    listed = description.get("warnings") if isinstance(description, Mapping) else None
    return tuple(
        ServiceWarning(str(each.get("code", "")), str(each.get("message", "")))
        for each in (listed if isinstance(listed, list) else [])
        if isinstance(each, Mapping)
    )


@cache
def _request_adapter() -> TypeAdapter[Any]:
    return TypeAdapter(EmbedRequest)
