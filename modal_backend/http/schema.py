"""OpenAI's embeddings API as data: what a request may say, how answers and errors look.

Source: OpenAI's API reference, "Create embeddings"; our own fields are marked. A field that is not
known is refused: ignoring one that changes vectors would give silently wrong ones. A field that is
null counts as absent: clients send what their own callers left out.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Iterator
from typing import Any, Final, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kalm_integrations import prompts
from kalm_integrations.codec import MEDIA_TYPE
from kalm_integrations.errors import (
    ConfigurationError,
    InvalidArgumentError,
    KalmError,
    RequestTooLargeError,
    ServiceUnavailableError,
)
from kalm_integrations.prompts import Role
from kalm_integrations.protocol import (
    EmbedRequest,
    EmbedResponse,
    Truncate,
    VectorDtype,
    error_fields,
)
from kalm_integrations.validation import MAX_CHARACTERS
from modal_backend.http import json_body
from modal_backend.http.headers import quoted

MAX_INSTRUCTION: Final = 16_384
"""Most characters in an instruction."""
MAX_PROMPTED: Final = 16 * 2**20
"""Most characters in the texts of a request, the instruction in each of them."""
_MOST_MISTAKES: Final = 5
_ROWS_AT_ONCE: Final = 8


class EmbeddingsBody(BaseModel):
    """The body of POST /v1/embeddings."""

    model_config = ConfigDict(
        extra="forbid", strict=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )

    input: Any
    """A text, or a list of texts. Token ids are refused."""
    model: str | None = None
    """The model that is served, and no other."""
    encoding_format: Literal["float", "base64"] | None = None
    """Lists of numbers, the default, or base64 of little-endian float32."""
    dimensions: int | None = Field(None, ge=1, le=2**16)
    """One of those that GET /v1/models lists; by default the model's own."""
    user: str | None = None
    """OpenAI's, for abuse reports; changes no vector."""

    input_type: Role | None = None
    """Ours. Sets the texts into the model's own template for that role."""
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
        try:
            fields = json_body.parse(body)
            if not isinstance(fields, dict):
                raise ConfigurationError("the body: it is not a JSON object.")
            return cls.model_validate(fields)
        except ValidationError as error:
            mistakes = error.errors(include_url=False, include_input=False, include_context=False)
        named = [
            f"{_field_name(mistake['loc'])}: {mistake['msg']}"
            for mistake in mistakes[:_MOST_MISTAKES]
        ]
        more = len(mistakes) - len(named)
        raise ConfigurationError("; ".join(named) + (f"; and {more} more." if more else "."))

    @property
    def texts(self) -> list[Any]:
        """`input` as a list; its members are checked by the service.

        Raises:
            InvalidArgumentError: Token ids, an empty list, or neither a string nor a list.
        """
        if isinstance(self.input, str):
            return [self.input]
        if not isinstance(self.input, list):
            raise InvalidArgumentError("input is neither a string nor a list of strings.")
        if not self.input:
            raise InvalidArgumentError("input is empty: a list without a text.")
        if all(isinstance(member, int) or _is_ids(member) for member in self.input):
            raise InvalidArgumentError(json_body.IDS_REFUSED)
        return self.input

    def request(self, query_template: str, *, packed: bool, timeout: float | None) -> EmbedRequest:
        """What the service is asked.

        Args:
            query_template: The model's own, for `input_type="query"`.
            packed: Whether the answer goes out as safetensors, so that `embed_dtype` applies.
            timeout: Seconds that the caller waits.

        Raises:
            ConfigurationError: A wrong instruction, or `embed_dtype` for a JSON answer.
            InvalidArgumentError: See `texts`.
            RequestTooLargeError: Over `MAX_PROMPTED` characters with the instruction in each text.
        """
        dtype, truncate = self.embed_dtype or "float32", self.truncate or "error"
        if not packed and dtype != "float32":
            raise ConfigurationError(
                f"embed_dtype={dtype!r} is for packed vectors (Accept: {MEDIA_TYPE}); "
                "a client that decodes JSON takes all vectors for float32."
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


def render(answer: EmbedResponse, encoding_format: str) -> Iterator[bytes]:
    """An answer as OpenAI's JSON: lists of numbers, or base64 of little-endian float32.

    In parts, none of which takes long to write.
    """
    vectors = answer.vectors.astype("<f4", copy=False)
    written = _base64 if encoding_format == "base64" else _numbers
    yield b'{"object":"list","data":['
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        rows = vectors[start : start + _ROWS_AT_ONCE]
        items = (
            b'{"object":"embedding","index":%d,"embedding":%b}' % (index, written(row))
            for index, row in enumerate(rows, start)
        )
        yield (b"," if start else b"") + b",".join(items)
    tokens = answer.usage.tokens
    model = orjson.dumps(answer.identity.model if answer.identity else "")
    usage = b'{"prompt_tokens":%d,"total_tokens":%d}' % (tokens, tokens)
    yield b'],"model":%b,"usage":%b}' % (model, usage)


def _base64(row: NDArray[np.float32]) -> bytes:
    return b'"%b"' % binascii.b2a_base64(row.data, newline=False)


def _numbers(row: NDArray[np.float32]) -> bytes:
    return orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)


def render_error(error: KalmError) -> bytes:
    """An error as OpenAI's JSON. Ours beside it: `invalid`, the texts by index."""
    described = error_fields(error)
    invalid = described["invalid"]
    described["type"] = "invalid_request_error" if error.status < 500 else "server_error"
    described["param"] = f"input[{invalid[0]['index']}]" if invalid else None
    return orjson.dumps({"error": described})


def error_headers(error: KalmError) -> dict[str, str]:
    """What goes with an error: who may enter, or when to come back."""
    if error.status == 401:
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, ServiceUnavailableError) and error.retry_after is not None:
        return {
            "Retry-After": str(math.ceil(error.retry_after)),
            # What OpenAI's servers send and its clients prefer: not rounded up to a second.
            "Retry-After-Ms": str(math.ceil(1000 * error.retry_after)),
        }
    return {}


def _field_name(location: tuple[int | str, ...]) -> str:
    if not location:
        return "the body"
    name = str(location[0])
    return name if name.isidentifier() and len(name) < 100 else quoted(name)


def _shortened(message: str) -> str:
    """`message` without its middle, if what it quotes is long."""
    return message if len(message) <= 600 else f"{message[:200]} ... {message[-300:]}"


def _is_ids(member: object) -> bool:
    return isinstance(member, list) and all(isinstance(part, int) for part in member)


def _prompted(template: str, texts: list[Any], truncate: Truncate) -> list[Any]:
    """`texts`, set into `template`. What is no text, or blank, stays as it is, for the service to
    name."""
    if truncate == "end":  # no model takes more
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
