"""Servers that are not ours, as far as a client can see them: what they refuse, in which words.

Each of `STOCK` is a server's behaviour, with its responses as recorded (vLLM, LiteLLM and Infinity
from the real ones; the others from their sources and their issues).
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from scripted import DIMENSIONS, vector_of
from serving import FaultyServer, Received, reply

Answer = tuple[int, Any]
"""Status and content; bytes and text are sent as they are."""
LIMIT = 1_000
"""Characters that a text may have."""


@dataclass(frozen=True)
class Stock:
    """One kind of server.

    Attributes:
        models: The answer to `GET /v1/models`; None for a list that names the model.
        refuses_base64: The answer to a request for base64; None if it is accepted.
        ignores_base64: Whether vectors are lists of numbers whatever was requested.
        too_long: The answer to a text of over `LIMIT` characters.
        cuts: Whether a request wants long texts cut; such a text has the vector of its beginning.
        refuses: The fields that are refused, with the answer.
        native: Dimensions that are refused if they are requested, also if they are the native ones.
        names: What the server calls the model.
        change: Changes the content of a response.
    """

    models: Answer | None = None
    refuses_base64: Answer | None = None
    ignores_base64: bool = False
    too_long: Answer = (400, {"error": {"message": "maximum context length is 9 tokens"}})
    cuts: Callable[[Mapping[str, Any]], bool] = lambda _: False
    refuses: Mapping[str, Answer] = field(default_factory=dict)
    names: str | None = None
    change: Callable[[dict[str, Any]], Any] = lambda content: content


def error(message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, **fields}}


def cuts_as_vllm(body: Mapping[str, Any]) -> bool:
    return body.get("truncate_prompt_tokens") == -1 and body.get("truncation_side") == "right"


def strict(name: str) -> Answer:
    """pydantic's answer to a field that a model forbids."""
    extra = {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are forbidden"}
    return 422, {"detail": [extra]}


def without_usage(content: dict[str, Any]) -> None:
    del content["usage"]


def zero_usage(content: dict[str, Any]) -> None:
    content["usage"] = {"prompt_tokens": 0, "total_tokens": 0}


def without_indices(content: dict[str, Any]) -> None:
    for item in content["data"]:
        del item["index"]


STOCK = {
    "vLLM 0.32": Stock(
        too_long=(
            400,
            error(
                "This model's maximum context length is 2048 tokens. However, your prompt contains "
                "at least 2049 input tokens, which exceeds this limit even without any output "
                "tokens. Please reduce the length of the input prompt. (parameter=input_tokens, "
                "value=2049)",
                type="BadRequestError",
                param="input_tokens",
                code=400,
            ),
        ),
        cuts=cuts_as_vllm,
        refuses={
            "dimensions": (
                400,
                error(
                    "Model 'kalm' does not support Matryoshka embeddings; dimensions must be unset "
                    "(received dimensions=512).",
                    type="BadRequestError",
                    param=None,
                    code=400,
                ),
            )
        },
    ),
    "vLLM without base64": Stock(
        refuses_base64=(
            400,
            {
                "object": "error",
                "message": "base64 encoding is not currently supported",
                "type": "BadRequestError",
                "param": None,
                "code": 400,
            },
        ),
        too_long=(
            400,
            {
                "object": "error",
                "message": "This model's maximum context length is 8192 tokens. However, you "
                "requested 9001 tokens in the input for embedding generation. Please reduce the "
                "length of the input.",
                "type": "BadRequestError",
                "param": None,
                "code": 400,
            },
        ),
        cuts=cuts_as_vllm,
    ),
    "TEI": Stock(
        models=(404, ""),
        too_long=(
            422,
            {
                "message": "Input validation error: `inputs` must have less than 512 tokens. "
                "Given: 600",
                "code": 422,
                "type": "Validation",
            },
        ),
    ),
    "TEI, older": Stock(
        models=(404, ""),
        too_long=(
            413,
            {
                "error": "Input validation error: `inputs` must have less than 512 tokens. "
                "Given: 600",
                "error_type": "Validation",
            },
        ),
    ),
    "Infinity 0.0.78": Stock(
        models=(200, {"data": [{"id": "kalm", "owned_by": "infinity", "stats": {}}]}),
        cuts=lambda _: True,
    ),
    "LiteLLM 1.108, a user's key": Stock(
        models=(401, {"detail": "invalid user key"}),
        too_long=(
            400,
            error(
                "litellm.ContextWindowExceededError: litellm.BadRequestError: "
                'ContextWindowExceededError: Hosted_vllmException - {"error": {"message": "This '
                "model's maximum context length is 2048 tokens. However, your prompt contains at "
                'least 2049 input tokens"}}\nmodel=kalm. context_window_fallbacks=None. '
                "fallbacks=None.\n\nLiteLLM: model group 'kalm' failed with the error above. No "
                "fallback was attempted.",
                type="invalid_request_error",
                param=None,
                code="400",
            ),
        ),
        cuts=cuts_as_vllm,
    ),
    "LM Studio": Stock(
        ignores_base64=True, too_long=(400, error("Input length 6491 exceeds context length 1500")),
        change=zero_usage,
    ),
    "llama.cpp": Stock(
        models=(200, {"object": "list", "data": [{"id": "m.gguf", "owned_by": "llamacpp"}]}),
        too_long=(
            500,
            error(
                "input (600 tokens) is too large to process. increase the physical batch size "
                "(current batch size: 512)",
                code=500,
                type="server_error",
            ),
        ),
    ),
    "llama.cpp, a small context": Stock(
        models=(501, error("This server does not support it", code=501)),
        refuses_base64=(400, error("encoding_format: only float")),
        too_long=(
            400,
            error(
                "request (600 tokens) exceeds the available context size (512 tokens), try "
                "increasing it",
                type="exceed_context_size_error",
                code=400,
            ),
        ),
    ),
    "Ollama": Stock(
        ignores_base64=True,
        too_long=(400, error("the input length exceeds the context length", type="api_error")),
        change=without_usage,
    ),
    "Jina": Stock(
        models=(403, {"detail": "Forbidden"}),
        too_long=(400, {"detail": "Input text exceeds maximum length of 8194 tokens"}),
        cuts=lambda body: body.get("truncate") is True,
        refuses={
            "truncate_prompt_tokens": strict("truncate_prompt_tokens"),
            "truncation_side": strict("truncation_side"),
        },
    ),
    "OpenAI": Stock(
        models=(403, error("Missing scopes: api.model.read", type="invalid_request_error")),
        too_long=(400, error("Invalid 'input[29]': maximum input length is 8192 tokens.")),
        refuses={
            name: (400, error(f"Unrecognized request argument supplied: {name}"))
            for name in ("truncate_prompt_tokens", "truncation_side", "truncate")
        },
    ),
    "a strict schema": Stock(
        models=(405, {"detail": "Method Not Allowed"}),
        refuses_base64=(422, {"detail": [{"loc": ["body", "encoding_format"], "msg": "'float'"}]}),
        too_long=(422, {"detail": [{"loc": ["body", "input", 1], "msg": "Bad value"}]}),
        refuses={
            name: strict(name) for name in ("truncate_prompt_tokens", "truncation_side", "truncate")
        },
        change=without_indices,
    ),
    "a gateway without words": Stock(
        models=(500, "<html>oops</html>"),
        refuses_base64=(400, "Bad Request"),
        too_long=(400, "Bad Request"),
        change=without_usage,
    ),
}  # fmt: skip


@dataclass
class StockServer(FaultyServer):
    """A server that behaves as `stock`."""

    stock: Stock = field(default_factory=Stock)

    @property
    def embedded(self) -> list[dict[str, Any]]:
        """The bodies of all requests to `/v1/embeddings`."""
        return [json.loads(each.body) for each in self.received if each.method == "POST"]

    async def _respond(self, request: Received, writer: asyncio.StreamWriter) -> None:
        status, content = self._answer(request)
        body = content if isinstance(content, str | bytes) else json.dumps(content)
        await reply(status, body)(request, writer)

    def _answer(self, request: Received) -> Answer:
        stock = self.stock
        if request.method == "GET":
            return stock.models or (200, {"data": [{"id": "kalm", "object": "model"}]})
        body = json.loads(request.body)
        base64_wanted = body.get("encoding_format") == "base64"
        if base64_wanted and stock.refuses_base64 is not None:
            return stock.refuses_base64
        for name, answer in stock.refuses.items():
            if name in body:
                return answer
        texts = body["input"]
        if any(len(text) > LIMIT for text in texts) and not stock.cuts(body):
            return stock.too_long
        as_text = base64_wanted and not stock.ignores_base64
        content = {
            "object": "list",
            "model": stock.names or body["model"],
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": _embedding(text[:LIMIT], body.get("dimensions"), as_text),
                }
                for index, text in enumerate(texts)
            ],
            "usage": {"prompt_tokens": 3 * len(texts), "total_tokens": 3 * len(texts)},
        }
        changed = stock.change(content)
        return 200, content if changed is None else changed


def _embedding(text: str, dimensions: int | None, as_text: bool) -> Any:
    assert dimensions in (None, DIMENSIONS)
    vector = vector_of(text, "<f4")
    return base64.b64encode(vector).decode() if as_text else vector.tolist()


def main(port: int) -> None:
    """Serve on `port` until killed."""
    server = StockServer()

    async def serve() -> None:
        listening = await asyncio.start_server(server._serve, "127.0.0.1", port)
        await listening.serve_forever()

    asyncio.run(serve())


if __name__ == "__main__":
    main(int(sys.argv[1]))
