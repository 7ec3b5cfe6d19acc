"""The errors of this package: class, code, HTTP status, whether to retry, what to do next.

A service sends an error's `status`, `code` and message, and the client raises the same class. The
`remedy` is advice for Python callers: `str` appends it, and it is never sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    from kalm_integrations.result import PartialResult


class KalmError(Exception):
    """Base class of every error that this package raises on purpose.

    Attributes:
        status: HTTP status of the response that reports it.
        code: Stable name in the body of that response.
        retryable: Whether the same request may succeed later. The client retries it (`retry`).
        most_retries: Bound for this class, if it is lower than `max_retries`; None for none.
        remedy: What to do next.
        retries: How many times the client has retried the request.
        partial: What the call embedded before, by the caller's indices; None if it embeds nothing.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    most_retries: ClassVar[int | None] = None
    remedy: ClassVar[str] = ""
    retries: int = 0
    partial: PartialResult | None = None

    @property
    def message(self) -> str:
        """What happened, without the remedy."""
        return super().__str__()

    def __str__(self) -> str:
        retries = f"Retries: {self.retries}." if self.retries else ""
        return " ".join(part for part in (self.message, retries, self.remedy) if part)


class ConfigurationError(KalmError, ValueError):
    """An argument or a KALM_* variable that cannot work."""

    status = 400
    code = "invalid_request"
    remedy = "Correct what is named here; docs and docstrings list what each argument takes."


class EngineLoadError(KalmError):
    """The engine could not be loaded, or its files differ from the tested ones."""

    permanent: bool = False
    """Whether loading it again on the same machine would fail in the same way."""
    status = 503
    code = "engine_not_loaded"
    remedy = "The service cannot embed until the model loads. Fix the problem above."


@dataclass(frozen=True, slots=True)
class InvalidText:
    """A text that cannot be embedded, and the reason."""

    index: int
    reason: str


class _TextsError(Exception):
    """An error about particular texts: `invalid` names each by the caller's index; it is empty if
    the error is about the request as a whole."""

    def __init__(self, message: str = "", invalid: Sequence[InvalidText] = ()) -> None:
        super().__init__(message)
        self.invalid = tuple(invalid)

    @classmethod
    def of(cls, invalid: Sequence[InvalidText]) -> Self:
        """The error whose message names the first five of `invalid` by index."""
        message = "; ".join(f"texts[{each.index}] {each.reason}" for each in invalid[:5])
        return cls(message + (f"; and {len(invalid) - 5} more." if invalid[5:] else "."), invalid)


class InvalidInputError(_TextsError, KalmError, ValueError):
    """Texts that cannot be embedded."""

    status = 400
    code = "invalid_input"
    remedy = (
        'Fix or remove these texts, or embed the others with iter_embed(texts, on_error="skip").'
    )


class InvalidArgumentError(InvalidInputError):
    """The argument as a whole is not a list of texts."""

    code = "invalid_argument"
    remedy = 'Pass a list of strings, for instance ["first text", "second text"].'


class InputTooLongError(InvalidInputError):
    """Texts over the model's length, with truncate="error"."""

    code = "input_too_long"
    remedy = (
        'Split these texts, or pass truncate="end" to embed their beginnings, or embed the '
        'others with iter_embed(texts, on_error="skip").'
    )


class BadRowsError(InvalidInputError):
    """Rows of a corpus that cannot be embedded, by file and line."""

    code = "bad_rows"
    remedy = (
        "Fix these rows, skip them (--on-error skip), keep them without a vector (--on-error "
        "null), cut long texts (KALM_TRUNCATE=end) or name the files' encoding (--encoding). A job "
        "that has begun keeps its options: other ones need another --output."
    )


class RequestTooLargeError(KalmError):
    """The request is too large for the service. The client splits it."""

    status = 413
    code = "request_too_large"
    remedy = "Lower batch_size."


class DeadlineExceededError(KalmError, TimeoutError):
    """The call's total time, `timeout`, ran out."""

    status = 504
    code = "deadline_exceeded"
    remedy = "Raise timeout=, or call warm_up() before; finished vectors are in .partial."


class ServiceUnavailableError(KalmError):
    """The service cannot respond at the moment."""

    status = 503
    code = "service_unavailable"
    retryable = True
    remedy = "Look at the service's logs, then call again."
    is_outage: bool = False
    """Whether nothing served the request: there was no connection, or a gateway says so."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = None if retry_after is None or not retry_after >= 0 else retry_after
        """Seconds to wait, if the service named any; it may send anything, even NaN."""


class RateLimitError(ServiceUnavailableError):
    """Too many concurrent requests, or too many per minute."""

    status = 429
    code = "rate_limited"
    remedy = "Lower max_concurrency, or request a higher limit."


class ConnectionFailedError(ServiceUnavailableError):
    """The service was not reached, or the connection broke before the response was complete."""

    code = "connection_failed"
    remedy = "Check base_url, the network and whether the service runs."


class ContainerFailedError(ServiceUnavailableError):
    """A container of the service could not start, or failed during the request. Retried at most
    once, because every container start is billed."""

    code = "container_failed"
    most_retries = 1
    remedy = (
        "See why with `modal app logs APP --since 1h` and the app's name; `kalm doctor --wake` "
        "tries again."
    )


class CanaryFailedError(KalmError):
    """The service failed its own test of its vectors, and returns none."""

    status = 503
    code = "canary_failed"
    remedy = "See the service's logs, and redeploy it; a retry would not help."


class AuthenticationError(KalmError):
    """No credential, or a wrong one."""

    status = 401
    code = "invalid_api_key"
    remedy = (
        "Pass api_key=, or set KALM_API_KEY, as the service was started with; a service on Modal "
        "may want modal_key= and modal_secret=, a proxy token, too."
    )


class ModalTokenError(AuthenticationError):
    """No token for Modal, or a wrong one."""

    code = "no_modal_token"
    remedy = "Run `modal setup`, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET."

    def __init__(self, message: str) -> None:
        # Modal's client appends advice of its own, with another command.
        super().__init__(message.partition(" If you have token credentials,")[0])


class PermissionDeniedError(KalmError):
    """The credential is known but does not allow this."""

    status = 403
    code = "permission_denied"
    remedy = "Use a credential that may call this service."


class NotFoundError(KalmError):
    """Nothing is served at this address, or not this model."""

    status = 404
    code = "not_found"
    remedy = "Check base_url= and model=; GET /v1/models lists what a service has."


class NotDeployedError(NotFoundError):
    """Modal has no such app or class, or it is of a version without what this client needs."""

    code = "not_deployed"
    remedy = "Run `kalm deploy`, or correct app_name=, class_name= and environment_name=."


class TransportError(KalmError):
    """An unexpected failure of a transport or an engine; the cause is chained."""

    code = "unexpected"
    remedy = "This is a bug: please report it with the traceback."


class InvalidResponseError(_TextsError, KalmError):
    """The response does not hold the requested vectors: their count, dimensions or type is wrong,
    or values are not finite or not of unit length."""

    code = "invalid_vectors"
    remedy = "Do not store vectors of this service until it is fixed."


class CorruptedAnswerError(InvalidResponseError):
    """The response was damaged in transit, or belongs to another request. It is discarded, and the
    request retried twice."""

    code = "corrupted_answer"
    retryable = True
    most_retries = 2
    remedy = (
        "Something between this client and the service mixes up responses or changes bytes: call "
        "the service directly, or fix the proxy between them."
    )


class JobFailedError(KalmError):
    """A bulk job on Modal ended before all rows were embedded."""

    code = "job_failed"
    remedy = "Fix the problem above, then run the same command again to resume."


class IdentityMismatchError(KalmError):
    """The service's vectors are of another space than the client expects."""

    code = "identity_mismatch"
    remedy = (
        "Do not mix vectors of two spaces in one index. Use the service, model=, dimensions= "
        "and document_instruction= of the index; for a new index, pass the service's identity as "
        "expected_identity=."
    )


def subclasses(kind: type[KalmError]) -> list[type[KalmError]]:
    """`kind` and its subclasses in this module, of all levels: the table as a list."""
    children = [each for child in kind.__subclasses__() for each in subclasses(child)]
    return list(dict.fromkeys([kind, *children])) if kind.__module__ == __name__ else []


def by_code(code: object) -> type[KalmError] | None:
    """The class of a code that a service may send; None for any other value."""
    return _BY_CODE.get(code) if isinstance(code, str) else None


CLIENT_ONLY = (JobFailedError, IdentityMismatchError, CorruptedAnswerError)
"""Raised by clients only; no service sends their codes."""
_BY_CODE = {kind.code: kind for kind in subclasses(KalmError) if kind not in CLIENT_ONLY}
