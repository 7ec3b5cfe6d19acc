import os
from collections.abc import Iterator
from typing import Any

import pytest
from serving import serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # the pages' blocks inherit it


@pytest.fixture
def chat_model() -> Iterator[dict[str, str]]:
    """The variables of a chat model with OpenAI's API, which repeats the question."""

    async def complete(request: Request) -> JSONResponse:
        sent = await request.json()
        assert sent["model"] == "echo"
        *_, question = sent["messages"][-1]["content"].partition("Question: ")
        message = {"role": "assistant", "content": f"an answer to {question!r}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        answer: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 1}
        return JSONResponse(answer | {"model": "echo", "choices": [choice]})

    app = Starlette(routes=[Route("/v1/chat/completions", complete, methods=["POST"])])
    with serving(app) as url:
        yield {
            "CHAT_MODEL": "echo",
            "OPENAI_API_KEY": "key",
            "OPENAI_BASE_URL": f"{url}/v1",
            "NO_PROXY": "*",
        }
