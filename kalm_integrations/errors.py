"""Every error of this package: what happened, its class, what to do next.

One table, used on both sides of the wire: a service answers with an error's `status`, `code` and
message, and the client raises the same class again. `remedy` is advice for Python callers: it is
appended when an error is shown, and never sent. Only `retry.py` reads `retryable` and
`most_retries`.
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
        partial: What had been embedded when the call failed, by index in the caller's list;
            None where the call embeds nothing.
        retryable: Whether the same request may succeed later. The client has retried already.
        most_retries: No more of them, whatever `max_retries` allows.
        remedy: What to do next.
        status: The HTTP status that a service answers with.
        code: The stable name in that answer's body.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    most_retries: ClassVar[int] = 100
    remedy: ClassVar[str] = ""
    partial: PartialResult | None = None

    @property
    def message(self) -> str:
        """What happened, without the remedy."""
        return super().__str__()

    def __str__(self) -> str:
        return " ".join(part for part in (self.message, self.remedy) if part)


class ConfigurationError(KalmError, ValueError):
    """An argument or a KALM_* variable that cannot work."""

    status = 400
    code = "invalid_request"
    remedy = "Correct what is named here; docs and docstrings list what each argument takes."


class EngineLoadError(KalmError):
    """The engine could not be loaded, or its files are not the ones that were tested.

    Attributes:
        permanent: Whether loading it again on the same machine would fail in the same way.
    """

    permanent: bool = False

    status = 503
    code = "engine_not_loaded"
    remedy = "The service cannot embed until the model loads. Fix the problem above."


@dataclass(frozen=True, slots=True)
class InvalidText:
    """One text that cannot be embedded: its index in the list of the call, and why."""

    index: int
    reason: str


class _TextsError(Exception):
    """What errors about particular texts share.

    Attributes:
        invalid: Every offending text that was found, by its index in the caller's list.
            Empty where the error concerns the request as a whole.
    """

    SHOWN: ClassVar[int] = 5

    def __init__(self, message: str = "", invalid: Sequence[InvalidText] = ()) -> None:
        super().__init__(message)
        self.invalid = tuple(invalid)

    @classmethod
    def of(cls, invalid: Sequence[InvalidText]) -> Self:
        """The error that names each of `invalid` by its index."""
        shown = "; ".join(f"texts[{bad.index}] {bad.reason}" for bad in invalid[: cls.SHOWN])
        more = len(invalid) - cls.SHOWN
        return cls(shown + (f"; and {more} more." if more > 0 else "."), invalid)


class InvalidInputError(_TextsError, KalmError, ValueError):
    """Texts that cannot be embedded. Never retried.

    Attributes:
        invalid: Every offending text that was found, by its index in the caller's list.
            Empty where the argument as a whole is wrong (a bare string, for instance).
    """

    status = 400
    code = "invalid_input"
    remedy = (
        'Fix or remove these texts, or embed the others with iter_embed(texts, on_error="skip").'
    )


class InvalidArgumentError(InvalidInputError):
    """The argument as a whole is not a list of texts, so that no index can be named."""

    status = 400
    code = "invalid_argument"
    remedy = 'Pass a list of strings, for instance ["first text", "second text"].'


class InputTooLongError(InvalidInputError):
    """Texts over the model's length, with truncate="error"."""

    status = 400
    code = "input_too_long"
    remedy = (
        'Split these texts, or pass truncate="end" to embed their beginnings, or embed the '
        'others with iter_embed(texts, on_error="skip").'
    )


class BadRowsError(InvalidInputError):
    """Rows of a corpus that cannot be embedded, by file and line. Finished shards stay."""

    code = "bad_rows"
    remedy = (
        "Mend these rows, or have such rows left out (--on-error skip) or kept without a vector "
        "(--on-error null), or long texts cut (KALM_TRUNCATE=end). If the job had begun, that is "
        "another job, for another --output."
    )


class RequestTooLargeError(KalmError):
    """The service takes no request of this size. The client splits it and goes on."""

    status = 413
    code = "request_too_large"
    remedy = "Lower batch_size."


class DeadlineExceededError(KalmError, TimeoutError):
    """The call's total time, `timeout`, ran out, retries and cold start included."""

    status = 504
    code = "deadline_exceeded"
    remedy = "Raise timeout=, or call warm_up() before; finished vectors are in .partial."


class ServiceUnavailableError(KalmError):
    """The service cannot answer just now.

    Attributes:
        retry_after: Seconds that the service asked to wait, or None.
    """

    status = 503
    code = "service_unavailable"
    retryable = True
    remedy = "The client has retried; look at the service's logs, then call again."

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimitError(ServiceUnavailableError):
    """Too many requests at a time, or in a minute."""

    status = 429
    code = "rate_limited"
    remedy = "The client has retried; lower max_concurrency, or ask for a higher limit."


class ConnectionFailedError(ServiceUnavailableError):
    """The service was not reached, or the connection broke before the whole answer was there."""

    code = "connection_failed"
    remedy = "The client has retried; check base_url, the network and whether the service runs."


class ContainerFailedError(ServiceUnavailableError):
    """A container of the service could not start, or died with the request in it. Retried
    at most once, because every start is billed."""

    code = "container_failed"
    most_retries = 1
    remedy = (
        "See why with `modal app logs APP --since 1h` and the app's name; `kalm doctor --wake` "
        "tries again."
    )


class CanaryFailedError(KalmError):
    """The service found its own vectors wrong, and serves none."""

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


def without_sign_in_advice(message: str) -> str:
    """Modal's message without the sentences on how to get a token: `ModalTokenError` names one way,
    and Modal's client another command for the same.

    Args:
        message: Of an exception of Modal's client.
    """
    return message.partition(" If you have token credentials,")[0]


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
    """A transport or engine failed in a way that it has no name for; the cause is chained."""

    code = "unexpected"
    remedy = "This is a bug: please report it with the traceback."


class InvalidResponseError(_TextsError, KalmError):
    """The service's answer is not the vectors that were requested: wrong count, dimensions,
    type, values that are not finite, or no unit length. Nothing of that request is returned.

    Attributes:
        invalid: The texts whose vectors are wrong, by index in the caller's list; empty where
            the answer as a whole is wrong.
    """

    code = "invalid_vectors"
    remedy = "Do not store vectors of this service until it is fixed."


class CorruptedAnswerError(InvalidResponseError):
    """The answer was damaged on its way, or belongs to another request. Nothing of it is
    returned; the request is retried twice."""

    code = "corrupted_answer"
    retryable = True
    most_retries = 2
    remedy = (
        "Something between this client and the service mixes up answers or changes bytes: call "
        "the service directly, or fix the proxy between them."
    )


class JobFailedError(KalmError):
    """A bulk job on Modal ended before all of it was embedded. What is finished stays."""

    code = "job_failed"
    remedy = "Mend what is named here; the same command then goes on with what is left."


class IdentityMismatchError(KalmError):
    """The service's vectors are of another space than the client expects."""

    code = "identity_mismatch"
    remedy = (
        "Vectors of two spaces must not meet in one index. Use the service, model=, dimensions= "
        "and document_instruction= that the index was made with; for a new index, the service's "
        "identity can be expected_identity=."
    )


def subclasses(kind: type[KalmError]) -> list[type[KalmError]]:
    """`kind` and everything below it in this module: the table, as a list."""
    below = [leaf for child in kind.__subclasses__() for leaf in subclasses(child)]
    return list(dict.fromkeys([kind, *below])) if kind.__module__ == __name__ else []


def by_code(code: object) -> type[KalmError] | None:
    """The error of a code that a service may send; None for codes that only clients use."""
    return _BY_CODE.get(code) if isinstance(code, str) else None


CLIENT_ONLY = (JobFailedError, IdentityMismatchError, CorruptedAnswerError)
"""What only a client can find out."""
_BY_CODE = {kind.code: kind for kind in subclasses(KalmError) if kind not in CLIENT_ONLY}
