"""A server that is not ours, with OpenAI's embeddings API: vLLM, TEI, Infinity, LM Studio, ...

Such servers differ in what they accept. A request with one short text finds out, once: whether the
server takes base64, how it truncates, and its native dimensions. After that, a request that is
refused is refused because of its texts. docs/servers.md lists the servers.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from kalm_integrations.errors import (
    ConfigurationError,
    IdentityMismatchError,
    InputTooLongError,
    InvalidInputError,
    InvalidResponseError,
    InvalidText,
    KalmError,
    RequestTooLargeError,
)
from kalm_integrations.models import is_known
from kalm_integrations.protocol import IDENTITY_HEADER, EmbedRequest, EmbedResponse, VectorDtype
from kalm_integrations.transports import openai_compat
from kalm_integrations.transports.http_pool import HttpResponse
from kalm_integrations.transports.redaction import redact, shorten

if TYPE_CHECKING:
    from kalm_integrations.config import ClientConfig

SHORT_TEXT: Final = "text"
"""The text of the request that finds out."""
_TRUNCATION: Final[Mapping[str, Any]] = {
    # vLLM: to the model's length; the side is "left" by default in old versions.
    "truncate_prompt_tokens": -1,
    "truncation_side": "right",
    "truncate": True,  # Jina, TEI
}
_REFUSED: Final = (400, 404, 413, 415, 422, 500, 501)
"""Statuses of a request with a field or a value that the server does not know."""
_REFUSED_TEXTS: Final = (400, 413, 422)
"""Statuses of a request with a text that the server does not take."""
_MAX_REFUSAL: Final = 2**16  # bytes of a refusal that are searched for a field's name


class Post(Protocol):
    """Sends the fields of a request with so many texts."""

    def __call__(
        self, fields: dict[str, Any], headers: dict[str, str], texts: int
    ) -> Awaitable[HttpResponse]: ...


@dataclass(frozen=True, slots=True)
class RequestForm:
    """The optional fields of requests, as the server accepts them."""

    encoding_format: str = "base64"
    dimensions: int | None = None
    truncation: Mapping[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """The fields, for a request."""
        fields = {"encoding_format": self.encoding_format, **self.truncation}
        return fields if self.dimensions is None else fields | {"dimensions": self.dimensions}

    def simpler(self, refusal: str) -> Self | None:
        """The form to try after a refusal; None if there is nothing left to leave out."""
        named = [name for name in self.truncation if re.search(rf"\b{name}\b", refusal)]
        if named:
            return replace(self, truncation=_without(self.truncation, named))
        if self.encoding_format == "base64":
            return replace(self, encoding_format="float")
        if self.truncation:
            return replace(self, truncation=_without(self.truncation, list(self.truncation)[-1:]))
        return None


def _without(fields: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


class OpenAIServer:
    """Sends requests to one such server.

    Args:
        config: The client's.
        post: Sends a request; the response may have any status.
        secrets: Redacted in error messages.
    """

    def __init__(self, config: ClientConfig, post: Post, secrets: Sequence[str]) -> None:
        self._config = config
        self._post = post
        self._secrets = secrets
        self._form = RequestForm()
        self._model: str | None = None
        """What the server calls the model, if the requested name is only an alias."""

    async def agree(self) -> bool:
        """Find out in which form the server takes requests; False if it turns out to be ours.

        Raises:
            KalmError: It does not embed even a short text.
        """
        truncate = self._config.truncate == "end"
        form = RequestForm(truncation=_TRUNCATION if truncate else {})
        form, response = await self._accepted(form)
        if response is None:
            return False
        native = response.vectors.shape[1]
        if self._config.dimensions not in (None, native):
            form = replace(form, dimensions=self._config.dimensions)
            await self._accepted(form)
        if truncate and "truncate" not in form.truncation and len(form.truncation) < 2:
            raise ConfigurationError(
                f'truncate="end": the server refuses {", ".join(_TRUNCATION)}, and cannot cut '
                "texts as requested."
            )
        self._form = form
        return True

    async def embed(self, request: EmbedRequest) -> EmbedResponse | None:
        """Send a request; None if the server turns out to be ours.

        Raises:
            RequestTooLargeError: It refuses some text of several: ask for fewer.
            InvalidInputError: It refuses the only text.
        """
        form = self._form
        reply = await self._send(request.texts, form)
        if IDENTITY_HEADER in reply.headers:
            return None
        if reply.status == 200:
            return self._read(reply, request.dtype)
        error = openai_compat.error_from_response(reply, self._secrets)
        too_long = openai_compat.is_about_length(error.message) or reply.status == 413
        if reply.status not in _REFUSED_TEXTS and not (reply.status == 500 and too_long):
            raise error
        if len(request.texts) > 1:
            raise RequestTooLargeError(error.message) from error
        if not too_long:  # whose fault it is: the text's, or the request's
            await self.agree()
            if self._form != form:
                return await self.embed(request)
        raise self._refused_text(error, too_long) from error

    def _refused_text(self, error: KalmError, too_long: bool) -> InvalidInputError:
        if not too_long:
            return InvalidInputError.of([InvalidText(0, f"is refused: {error.message}")])
        cut = ', although truncate="end" was sent' if self._form.truncation else ""
        reason = f"is too long for the server{cut}: {error.message}"
        return InputTooLongError.of([InvalidText(0, reason.rstrip("."))])

    async def _accepted(self, form: RequestForm) -> tuple[RequestForm, EmbedResponse | None]:
        """`form`, or what is left of it, and the response to it; None if the server is ours."""
        while True:
            reply = await self._send([SHORT_TEXT], form)
            if IDENTITY_HEADER in reply.headers:
                return form, None
            if reply.status == 200:
                try:
                    return form, self._read(reply, self._config.vector_dtype)
                except InvalidResponseError as unreadable:
                    error: KalmError = unreadable
            else:
                error = openai_compat.error_from_response(reply, self._secrets)
            simpler = form.simpler(reply.body[:_MAX_REFUSAL].decode(errors="replace"))
            if simpler is None or reply.status not in (200, *_REFUSED):
                raise error
            form = simpler

    async def _send(self, texts: list[str], form: RequestForm) -> HttpResponse:
        fields = {"model": self._config.served_model, "input": texts, **form.fields()}
        return await self._post(fields, {"Accept": "application/json"}, len(texts))

    def _read(self, reply: HttpResponse, dtype: VectorDtype) -> EmbedResponse:
        model, response = openai_compat.decode(reply, dtype, self._secrets)
        if model:
            self._check_model(model)
        return response

    def _check_model(self, answered: str) -> None:
        """Check the name in a response. Only the name of a known model says what to expect."""
        requested, expected = self._config.served_model, self._config.model_profile.space.model
        if _same_name(answered, requested) or _same_name(answered, expected):
            return
        contradicts = self._config.profile is not None and is_known(answered)
        if not is_known(requested) and not contradicts:
            self._model = self._model or answered
            if answered == self._model:
                return
        raise IdentityMismatchError(
            f"requested model {requested!r}, but {shorten(redact(answered, self._secrets))!r} "
            "answered. If it is the same model, pass that name as model= and a known one as "
            "profile=."
        )


def _same_name(name: str, other: str) -> bool:
    """Whether two names differ only in what stands before the last slash, as routers and folders
    do, or in capitals."""
    first, second = (each.rstrip("/").rpartition("/")[2].casefold() for each in (name, other))
    return first == second
