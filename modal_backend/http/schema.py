"""Requests of the HTTP API: body and headers.

Source: OpenAI's API reference, "Create embeddings"; our own fields are marked. An unknown field is
refused: ignoring one that changes vectors would silently return wrong vectors. A field that is null
counts as absent, because clients send fields that their own callers left out.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers

from kalm_integrations import prompts
from kalm_integrations.codec import MEDIA_TYPE
from kalm_integrations.errors import (
    ConfigurationError,
    InvalidArgumentError,
    RequestTooLargeError,
)
from kalm_integrations.prompts import Role
from kalm_integrations.protocol import (
    TIMEOUT_HEADER,
    EmbedRequest,
    Truncate,
    VectorDtype,
    default_role,
)
from modal_backend.http import json_body
from modal_backend.service import cut

JSON: Final = "application/json"
MAX_INSTRUCTION: Final = 16_384
"""Most characters in an instruction."""
MAX_PROMPTED: Final = 16 * 2**20
"""Most characters in the texts of a request, with the instruction in each of them."""
_MAX_REPORTED_ERRORS: Final = 5


class EmbeddingsBody(BaseModel):
    """The body of POST /v1/embeddings."""

    model_config = ConfigDict(
        extra="forbid", strict=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )

    input: Any  # texts that cannot be embedded are named by their index
    """A text, or a list of texts. Token ids are refused."""
    model: str | None = None
    """The name of the served model, with ":query" or ":document" at its end for that role."""
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
    """Ours. Type of packed vectors, "float32" by default; JSON responses are float32, as OpenAI's
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
        names = [str(detail["loc"][0]) for detail in details]
        messages = [
            f"{name if name.isidentifier() else repr(name)}: {detail['msg']}"
            for name, detail in zip(names, details[:_MAX_REPORTED_ERRORS], strict=False)
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
        lists = (item if isinstance(item, list) else [item] for item in self.input)
        if all(isinstance(item, int) for items in lists for item in items):
            raise InvalidArgumentError(json_body.IDS_REFUSED)
        return self.input

    def request(self, query_template: str, *, packed: bool, timeout: float | None) -> EmbedRequest:
        """The request to the service.

        Args:
            query_template: The model's own template, for `input_type="query"`.
            packed: Whether the response is safetensors, so that `embed_dtype` applies.
            timeout: Seconds that the caller waits.

        Raises:
            ConfigurationError: An unknown instruction, or `embed_dtype` for a JSON response.
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
                raise ConfigurationError(f"instruction: {error}.") from None
        elif self.input_type == "query":
            template = query_template
        texts = self.texts
        if template != prompts.AS_IS:
            texts = _prompted(template, texts, truncate)
        default = "query" if self.input_type == "query" else default_role(texts)
        return EmbedRequest(
            texts=texts,
            role=self.priority or default,
            dimensions=self.dimensions,
            truncate=truncate,
            dtype=dtype,
            timeout=timeout,
        )


def _prompted(template: str, texts: list[Any], truncate: Truncate) -> list[Any]:
    """Apply `template` to each text. Items that are blank, or not strings, are left unchanged: the
    service names them in its error."""
    if truncate == "end":
        texts = cut(texts)
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


def prefers_packed(headers: Headers) -> bool:
    """Whether the caller prefers packed vectors to JSON.

    The default is JSON: for equal weights, `*/*`, no header, and if neither type is accepted.
    """
    accept = ",".join(headers.getlist("accept"))
    return _weight(MEDIA_TYPE, accept) > _weight(JSON, accept)


def timeout_of(headers: Headers) -> float | None:
    """Seconds that the caller waits; None without the header.

    Raises:
        ConfigurationError: It is not a positive number of seconds.
    """
    value = headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigurationError(f"{TIMEOUT_HEADER}: {value!r} is not a number of seconds.")
    return seconds


@lru_cache(maxsize=64)  # clients send the same header again and again
def _weight(media_type: str, accept: str) -> float:
    """The weight of a media type in an Accept header: that of its most specific range (RFC 9110,
    12.5.1). Malformed ranges are skipped."""
    ranges = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
    weights: dict[str, float] = {}
    for choice in accept.lower().split(","):
        name, *parameters = (part.strip() for part in choice.split(";"))
        values = [part[2:] for part in parameters if part.startswith("q=")]
        try:
            weight = float(values[0]) if values else 1.0
        except ValueError:
            continue
        if name in ranges and 0 <= weight <= 1:
            weights[name] = max(weight, weights.get(name, 0.0))
    return next((weights[name] for name in ranges if name in weights), 0.0)
