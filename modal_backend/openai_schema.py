"""OpenAI's embeddings API as data: what a request may say, how answers and errors look.

Source: OpenAI's API reference, "Create embeddings"; our own fields are marked. A field that is not
known is refused: ignoring one that changes vectors would give silently wrong ones.
"""

from __future__ import annotations

import binascii
import json
import math
from collections.abc import Iterator
from typing import Any, Final, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from kalm_integrations import prompts
from kalm_integrations.errors import (
    ConfigurationError,
    InvalidArgumentError,
    KalmError,
    ServiceUnavailableError,
)
from kalm_integrations.prompts import Role
from kalm_integrations.wire import (
    MEDIA_TYPE,
    EmbedAnswer,
    EmbedRequest,
    Truncate,
    VectorDtype,
    error_fields,
)

_ROWS_AT_ONCE: Final = 8


class EmbeddingsBody(BaseModel):
    """The body of POST /v1/embeddings."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    input: Any
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None  # OpenAI's, for abuse reports; changes no vector

    input_type: Role | None = None
    """Ours. Sets the texts into the model's own template for that role."""
    instruction: str | None = None
    """Ours. A preset, a task sentence or a template, instead of that template."""
    truncate: Truncate = "error"
    """Ours. What to do with a text over the model's length."""
    priority: Role | None = None
    """Ours. Queries go first; by default a single text and `input_type="query"` are queries."""
    embed_dtype: VectorDtype = "float32"
    """Ours. Type of packed vectors; JSON answers are float32, as OpenAI's clients decode them."""

    @classmethod
    def parse(cls, body: bytes) -> EmbeddingsBody:
        """Read a body.

        Raises:
            ConfigurationError: Not JSON, or a field is unknown or of a wrong value; all are named.
        """
        try:
            # The standard library keeps lone surrogates, so that their text can be named later.
            return cls.model_validate(json.loads(body))
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'the body'}: {item['msg']}"
                for item in error.errors(include_url=False, include_input=False)
            )
            raise ConfigurationError(f"{wrong}.") from None
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"the body is not JSON: {error}.") from None

    @property
    def texts(self) -> list[Any]:
        """`input` as a list; its members are checked by the service.

        Raises:
            InvalidArgumentError: Token ids, or neither a string nor a list.
        """
        if isinstance(self.input, str):
            return [self.input]
        if not isinstance(self.input, list) or not self.input:
            raise InvalidArgumentError("input is neither a string nor a list of strings.")
        if all(isinstance(member, int) or _is_ids(member) for member in self.input):
            raise InvalidArgumentError(
                "input is token ids: they are another tokenizer's, and would give silently wrong "
                "vectors. (LangChain's OpenAIEmbeddings sends text with "
                "check_embedding_ctx_length=False.)"
            )
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
        """
        if not packed and self.embed_dtype != "float32":
            raise ConfigurationError(
                f"embed_dtype={self.embed_dtype!r} is for packed vectors (Accept: {MEDIA_TYPE}); "
                "a client that decodes JSON takes all vectors for float32."
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
        default: Role = "query" if self.input_type == "query" or len(texts) == 1 else "document"
        return EmbedRequest(
            texts=[_prompted(template, text) for text in texts],
            role=self.priority or default,
            dimensions=self.dimensions,
            truncate=self.truncate,
            dtype=self.embed_dtype,
            timeout=timeout,
        )


def render(answer: EmbedAnswer, encoding_format: str) -> Iterator[bytes]:
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
    described.pop("retry_after", None)  # a header's matter
    invalid = described.setdefault("invalid", [])
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


def _is_ids(member: object) -> bool:
    return isinstance(member, list) and all(isinstance(part, int) for part in member)


def _prompted(template: str, text: Any) -> Any:
    # What is no text, or blank, stays as it is, for the service to name.
    return prompts.apply(template, text) if isinstance(text, str) and text.strip() else text
