"""The body of an embeddings request.

Source: OpenAI's API reference, "Create embeddings"; our own fields are marked. An unknown field is
refused: ignoring one that changes vectors would silently return wrong vectors. A field that is null
counts as absent, because clients send fields that their own callers left out.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kalm_integrations import prompts
from kalm_integrations.codec import MEDIA_TYPE
from kalm_integrations.errors import (
    ConfigurationError,
    InvalidArgumentError,
    RequestTooLargeError,
)
from kalm_integrations.prompts import Role
from kalm_integrations.protocol import EmbedRequest, Truncate, VectorDtype
from kalm_integrations.validation import MAX_CHARACTERS
from modal_backend.http import json_body

MAX_INSTRUCTION: Final = 16_384
"""Most characters in an instruction."""
MAX_PROMPTED: Final = 16 * 2**20
"""Most characters in the texts of a request, with the instruction in each of them."""
_MAX_REPORTED_ERRORS: Final = 5
_MAX_QUOTED: Final = 200


class EmbeddingsBody(BaseModel):
    """The body of POST /v1/embeddings."""

    model_config = ConfigDict(
        extra="forbid", strict=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )

    input: Any  # texts that cannot be embedded are named by their index
    """A text, or a list of texts. Token ids are refused."""
    model: str | None = None
    """The name of the served model."""
    encoding_format: Literal["float", "base64"] | None = None
    """Lists of numbers, the default, or base64 of little-endian float32."""
    dimensions: int | None = Field(None, ge=1, le=2**16)
    """One of those that GET /v1/models lists; by default the model's own."""
    user: str | None = None
    """OpenAI's, for abuse reports; changes no vector."""

    input_type: Role | None = None
    """Ours. Applies the model's own template for that role."""
    instruction: str | None = Field(None, max_length=MAX_INSTRUCTION)
    """Ours. A preset, a task sentence or a template, instead of that template."""
    truncate: Truncate | None = None
    """Ours. What to do with a text over the model's length: "error", the default, or "end"."""
    priority: Role | None = None
    """Ours. Queries go first; by default a single text and `input_type="query"` are queries."""
    embed_dtype: VectorDtype | None = None
    """Ours. Type of packed vectors, "float32" by default; JSON answers are float32, as OpenAI's
    clients decode them."""

    @classmethod
    def parse(cls, body: bytes | bytearray) -> EmbeddingsBody:
        """Read a body.

        Raises:
            ConfigurationError: Not JSON, or a field is unknown or of a wrong value.
            InvalidArgumentError, RequestTooLargeError: See `json_body.parse`.
        """
        fields = json_body.parse(body)
        if not isinstance(fields, dict):
            raise ConfigurationError("the body: it is not a JSON object.")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False, include_context=False)
        messages = [
            f"{_field_name(detail['loc'])}: {detail['msg']}"
            for detail in details[:_MAX_REPORTED_ERRORS]
        ]
        more = len(details) - len(messages)
        raise ConfigurationError("; ".join(messages) + (f"; and {more} more." if more else "."))

    @property
    def texts(self) -> list[Any]:
        """`input` as a list, whose items the service checks.

        Raises:
            InvalidArgumentError: Token ids, an empty list, or neither a string nor a list.
        """
        if isinstance(self.input, str):
            return [self.input]
        if not isinstance(self.input, list):
            raise InvalidArgumentError("input is neither a string nor a list of strings.")
        if not self.input:
            raise InvalidArgumentError("input is empty: a list without a text.")
        if all(isinstance(item, int) or _is_token_ids(item) for item in self.input):
            raise InvalidArgumentError(json_body.IDS_REFUSED)
        return self.input

    def request(self, query_template: str, *, packed: bool, timeout: float | None) -> EmbedRequest:
        """The request to the service.

        Args:
            query_template: The model's own template, for `input_type="query"`.
            packed: Whether the response is safetensors, so that `embed_dtype` applies.
            timeout: Seconds that the caller waits.

        Raises:
            ConfigurationError: An unknown instruction, or `embed_dtype` for a JSON answer.
            InvalidArgumentError: See `texts`.
            RequestTooLargeError: Over `MAX_PROMPTED` characters with the instruction in each text.
        """
        dtype, truncate = self.embed_dtype or "float32", self.truncate or "error"
        if not packed and dtype != "float32":
            raise ConfigurationError(
                f"embed_dtype={dtype!r} is for packed vectors (Accept: {MEDIA_TYPE}); "
                "clients that decode JSON expect float32."
            )
        template = prompts.AS_IS
        if self.instruction is not None:
            try:
                template = prompts.resolve(self.instruction)
            except ValueError as error:
                raise ConfigurationError(f"instruction: {_shortened(str(error))}.") from None
        elif self.input_type == "query":
            template = query_template
        texts = self.texts
        if template != prompts.AS_IS:
            texts = _prompted(template, texts, truncate)
        default: Role = "query" if self.input_type == "query" or len(texts) == 1 else "document"
        return EmbedRequest(
            texts=texts,
            role=self.priority or default,
            dimensions=self.dimensions,
            truncate=truncate,
            dtype=dtype,
            timeout=timeout,
        )


def quoted(value: str) -> str:
    """`value` for a message: in quotes, and shortened if it is long."""
    if len(value) <= _MAX_QUOTED:
        return repr(value)
    return f"{value[:_MAX_QUOTED]!r}... ({len(value):,} characters)"


def _field_name(location: tuple[int | str, ...]) -> str:
    if not location:
        return "the body"
    name = str(location[0])
    return name if name.isidentifier() and len(name) < 100 else quoted(name)


def _shortened(message: str) -> str:
    """`message` without its middle, if what it quotes is long."""
    return message if len(message) <= 600 else f"{message[:200]} ... {message[-300:]}"


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) for item in value)


def _prompted(template: str, texts: list[Any], truncate: Truncate) -> list[Any]:
    """Apply `template` to each text. Items that are blank, or not strings, are left unchanged: the
    service names them in its error."""
    if truncate == "end":  # no model reads more
        texts = [text[:MAX_CHARACTERS] if isinstance(text, str) else text for text in texts]
    characters = len(template) * len(texts)
    characters += sum(len(text) for text in texts if isinstance(text, str))
    if characters > MAX_PROMPTED:
        raise RequestTooLargeError(
            f"{len(texts):,} texts with an instruction of {len(template):,} characters in each are "
            f"{characters:,} characters; the limit is {MAX_PROMPTED:,}."
        )
    return [
        prompts.apply(template, text) if isinstance(text, str) and text.strip() else text
        for text in texts
    ]
