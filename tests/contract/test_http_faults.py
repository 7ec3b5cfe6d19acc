# ruff: noqa: E501 (a table reads best one row a line)
"""What a caller gets when HTTP goes wrong, over a real server that misbehaves.

Ten texts travel in two requests, one after the other; the fault hits the second. For each fault:
the class and message of the error, the number of requests, and the finished vectors. The sync
and the async way give the same.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from email.utils import formatdate
from typing import Any

import numpy as np
import pytest
from langchain_core.vectorstores import InMemoryVectorStore
from scripted import vectors_of
from serving import (
    FaultyServer,
    Received,
    Step,
    cut_off,
    drip,
    packed,
    plain,
    reply,
    reset,
    stall,
)
from yarl import URL

from kalm_integrations import KalmClient, KalmModalEmbeddings, errors
from kalm_integrations.models import EMBEDDED
from kalm_integrations.transports import openai_compat
from kalm_integrations.transports.http_pool import HttpResponse

pytestmark = pytest.mark.usefixtures("quick_retries")
TEXTS = [f"text {i}" for i in range(10)]
SECRET = "sk-very-secret"


def client_of(server: FaultyServer, **settings: Any) -> KalmClient:
    defaults: dict[str, Any] = {
        "base_url": server.url,
        "api_key": SECRET,
        "model": EMBEDDED.space.model,
        "batch_size": 5,
        "max_concurrency": 1,
        "max_retries": 2,
    }
    return KalmClient(**defaults | settings)


def openai_error(status: int, message: str, code: str | None = None, **headers: str) -> Step:
    body = {"error": {"message": message, "type": "x", "param": None, "code": code}}
    return reply(status, json.dumps(body), **headers)


def other(change: Callable[[np.ndarray[Any, Any]], Any]) -> Step:
    """Our server's answer with other vectors."""
    return packed(lambda answer: replace(answer, vectors=change(answer.vectors.copy())))


def poisoned(value: float) -> Step:
    def poison(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        vectors[3, 7] = value
        return vectors

    return other(poison)


def reindexed(indices: list[int]) -> Step:
    def change(content: dict[str, Any]) -> None:
        for item, index in zip(content["data"], indices, strict=True):
            item["index"] = index

    return plain(change)


async def redirect(request: Received, writer: asyncio.StreamWriter) -> None:
    await reply(303, Location="/v1/embeddings?waiting=1")(request, writer)


@dataclass
class Fault:
    """`steps` repeat; `requests` counts requests to /v1/embeddings."""

    steps: list[Step]
    error: type[errors.KalmError]
    message: str
    requests: int | None
    ours: bool = True
    timeout: float = 30


ANY = None  # during an outage, time is the limit
NEVER_RETRIED, RETRIED = 2, 4  # the good first request, and one, or one and two retries
Unavailable, Invalid = errors.ServiceUnavailableError, errors.InvalidResponseError
NAN = float("nan")
FAULTS = {
    "429": Fault([openai_error(429, "slow down")], errors.RateLimitError, "HTTP 429.*slow down", RETRIED),
    "500": Fault([reply(500, "boom")], Unavailable, "HTTP 500, request [0-9a-f]{32}: boom", RETRIED),
    "502, an HTML page": Fault(
        [reply(502, "<html><title>Bad Gateway</title>...", "text/html")],
        Unavailable, "HTTP 502 from http.*the page 'Bad Gateway'", ANY,
    ),
    "503": Fault([openai_error(503, "starting")], Unavailable, "HTTP 503.*starting", ANY),
    "503 with Retry-After": Fault([reply(503, Retry_After="0")], Unavailable, "HTTP 503", RETRIED),
    "504": Fault([reply(504)], Unavailable, "HTTP 504.*an empty body", ANY),
    "408": Fault([reply(408)], Unavailable, "HTTP 408", RETRIED),
    "409": Fault([reply(409)], Unavailable, "HTTP 409", RETRIED),
    "425": Fault([reply(425)], Unavailable, "HTTP 425", RETRIED),
    "400": Fault([openai_error(400, "no such option")], errors.ConfigurationError, "HTTP 400.*no such", NEVER_RETRIED),
    "401": Fault([openai_error(401, f"wrong: {SECRET}")], errors.AuthenticationError, r"wrong: \*\*\*.*KALM_API_KEY", NEVER_RETRIED),
    "403": Fault([openai_error(403, "not you")], errors.PermissionDeniedError, "HTTP 403.*not you", NEVER_RETRIED),
    "404": Fault([openai_error(404, "no model")], errors.NotFoundError, "HTTP 404.*no model", NEVER_RETRIED),
    "422": Fault([reply(422, '{"detail": "bad"}')], errors.ConfigurationError, "HTTP 422.*bad", NEVER_RETRIED),
    "303 without end": Fault([redirect], errors.ConnectionFailedError, "50 redirects", RETRIED),
    "303 to another server": Fault(
        [reply(303, Location="http://127.0.0.1:9/")],
        errors.ConfigurationError, r"another server, http://127\.0\.0\.1:9", NEVER_RETRIED,
    ),
    "301": Fault([reply(301, Location="/new")], errors.ConfigurationError, "moved to .*/new: correct base_url", NEVER_RETRIED),
    "reset before the answer": Fault([reset], errors.ConnectionFailedError, "POST http", RETRIED),
    "reset in the headers": Fault([cut_off(40)], errors.ConnectionFailedError, "POST http", RETRIED),
    "body cut off": Fault([cut_off(900)], errors.ConnectionFailedError, "POST http", RETRIED),
    "stalled": Fault([stall], errors.DeadlineExceededError, r"timeout=0\.5 s", NEVER_RETRIED, timeout=0.5),
    "slow drip": Fault([drip], errors.DeadlineExceededError, r"timeout=0\.5 s", NEVER_RETRIED, timeout=0.5),
    "too few vectors": Fault([other(lambda v: v[:-1])], Invalid, r"requested 5 .* \(4, 512\)", NEVER_RETRIED),
    "too many vectors": Fault([other(lambda v: np.vstack([v, v]))], Invalid, r"\(10, 512\)", NEVER_RETRIED),
    "other dimensions": Fault([other(lambda v: v[:, :256].copy())], Invalid, r"\(5, 256\)", NEVER_RETRIED),
    "NaN": Fault([poisoned(NAN)], Invalid, r"texts\[8\] got values that are not finite", NEVER_RETRIED),
    "infinity": Fault([poisoned(float("inf"))], Invalid, r"texts\[8\] got values that are not", NEVER_RETRIED),
    "zero vectors": Fault([other(lambda v: v * 0)], Invalid, r"texts\[5\] got a vector of length 0", NEVER_RETRIED),
    "not normalized": Fault([other(lambda v: v * 2)], Invalid, r"texts\[5\] got a vector of length 2\.0.*texts\[9\]", NEVER_RETRIED),
    "another identity": Fault(
        [packed(lambda a: replace(a, identity=replace(EMBEDDED.space, revision="new")))],
        errors.IdentityMismatchError, "the service changed .*'new'", NEVER_RETRIED,
    ),
    "JSON instead of packed": Fault([plain()], errors.IdentityMismatchError, "no longer reports an identity", NEVER_RETRIED),
    "a login page": Fault(
        [reply(200, "<title>Sign in</title>", "text/html")], Invalid, "text/html: the page 'Sign in'", NEVER_RETRIED
    ),
    "garbage of the right type": Fault(
        [reply(200, b"\xff" * 300, "application/vnd.safetensors")], errors.CorruptedAnswerError, "not packed vectors", RETRIED
    ),
    "gzip bomb": Fault(
        [reply(200, gzip.compress(bytes(10**8)), Content_Encoding="gzip")], Invalid, "compressed", NEVER_RETRIED
    ),
    "an endless body": Fault([reply(200, bytes(2 * 10**7))], Invalid, "over [0-9,]+ bytes", NEVER_RETRIED),
    "plain: invalid JSON": Fault([reply(200, '{"data": [')], Invalid, "not embeddings", NEVER_RETRIED, ours=False),
    "plain: a missing index": Fault([reindexed([0, 1, 2, 3, 5])], Invalid, r"not 0 to 4, each once: \[0, 1, 2, 3, 5\]", NEVER_RETRIED, ours=False),
    "plain: a doubled index": Fault([reindexed([0, 1, 2, 3, 3])], Invalid, "not 0 to 4, each once", NEVER_RETRIED, ours=False),
    "plain: too few": Fault([plain(lambda c: c["data"].pop() and None)], Invalid, r"\(4, 512\)", NEVER_RETRIED, ours=False),
    "plain: another model": Fault(
        [plain(lambda c: c | {"model": "other"})], errors.IdentityMismatchError, "but 'other' answered", NEVER_RETRIED, ours=False
    ),
    "plain: not base64": Fault(
        [plain(lambda c: c["data"][0].update(embedding="@@@"))], Invalid, "not embeddings", NEVER_RETRIED, ours=False
    ),
}  # fmt: skip


def call(client: KalmClient, way: str) -> errors.KalmError | None:
    try:
        result = client.embed(TEXTS) if way == "sync" else asyncio.run(client.aembed(TEXTS))
    except errors.KalmError as error:
        return error
    assert np.array_equal(result.vectors, vectors_of(TEXTS))
    return None


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_persistent_fault_raises_its_error_and_keeps_finished_vectors(
    name: str, way: str
) -> None:
    fault = FAULTS[name]
    steps = [None, *fault.steps * 200]
    with FaultyServer(steps, ours=fault.ours) as server:
        client = client_of(server, timeout=fault.timeout)
        error = call(client, way)
        client.close()
    assert type(error) is fault.error, error
    import re

    assert re.search(fault.message, str(error)), error
    assert fault.requests in (ANY, len(server.posted))
    assert error.partial is not None
    assert error.partial.indices.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(error.partial.vectors, vectors_of(TEXTS[:5]))
    assert SECRET not in f"{error!r} {error} {error.__cause__!r}"


async def answer_and_reset(request: Received, writer: asyncio.StreamWriter) -> None:
    await packed()(request, writer)
    writer.close()


TEMPORARY: dict[str, list[Step]] = {
    "reset after the answer": [answer_and_reset],
    "429 with seconds": [openai_error(429, "slow down", Retry_After="0.2")],
    "503 twice": [reply(503), reply(503)],
    "reset, then fine": [reset],
    "body cut off, then fine": [cut_off(900)],
    "a 303 chain that ends": [redirect, redirect, redirect],
    "413: split": [reply(413)],
}


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("name", TEMPORARY)
def test_a_temporary_fault_is_retried_without_loss(name: str, way: str) -> None:
    with FaultyServer([None, *TEMPORARY[name]]) as server:
        client = client_of(server)
        assert call(client, way) is None
        client.close()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "2"}, 2.0),
        ({"Retry-After": "2", "Retry-After-Ms": "1500"}, 1.5),
        ({"Retry-After": "2", "Retry-After-Ms": "soon"}, 2.0),
        ({"Retry-After": "soon"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert openai_compat.retry_after(headers) == seconds


@pytest.mark.parametrize(
    ("headers", "seconds"), [({}, 1.5), ({"Retry-After": "2"}, 2.0), ({"Retry-After": "-2"}, None)]
)
def test_retry_after_may_be_in_the_body(headers: dict[str, str], seconds: float | None) -> None:
    body = {"error": {"message": "busy", "code": "rate_limited", "retry_after": 1.5}}
    response = HttpResponse(429, headers, bytearray(json.dumps(body).encode()), "1", URL())
    error = openai_compat.error_from_response(response, [])
    assert isinstance(error, errors.RateLimitError)
    assert error.retry_after == seconds


def test_retry_after_may_be_a_date() -> None:
    when = formatdate(time.time() + 2, usegmt=True)
    with FaultyServer([openai_error(429, "later", Retry_After=when)]) as server:
        client = client_of(server)
        start = time.monotonic()
        client.embed(["a"])
        client.close()
    assert 0.9 < time.monotonic() - start < 60  # dates are whole seconds


def test_shuffled_indices_are_sorted() -> None:
    def shuffle(content: dict[str, Any]) -> None:
        content["data"] = content["data"][::-1]

    with FaultyServer([plain(shuffle)] * 2, ours=False) as server:
        client = client_of(server)
        assert call(client, "sync") is None
        client.close()


def test_a_refused_connection_is_reported_as_such() -> None:
    with FaultyServer() as server:
        pass
    client = client_of(server)
    error = call(client, "sync")
    client.close()
    assert isinstance(error, errors.ConnectionFailedError)
    assert f"connection refused: is the service running at {server.url}?" in str(error)


def test_a_vector_store_gets_no_row_of_a_failed_call() -> None:
    with FaultyServer([None, poisoned(NAN)]) as server:
        settings: dict[str, Any] = {"model": EMBEDDED.space.model, "batch_size": 5}
        embeddings = KalmModalEmbeddings(base_url=server.url, max_concurrency=1, **settings)
        store = InMemoryVectorStore(embeddings)
        with pytest.raises(errors.InvalidResponseError):
            store.add_texts(TEXTS)
        assert store.store == {}
        store.add_texts(TEXTS)
        for document in store.store.values():
            assert np.array_equal(document["vector"], vectors_of([document["text"]])[0])
        embeddings.close()


def test_a_probe_without_a_response_does_not_block_later_calls() -> None:
    class Silent(FaultyServer):
        probes = 0

        async def _respond(self, request: Any, writer: Any) -> None:
            if request.method == "GET":
                Silent.probes += 1
                if Silent.probes == 1:
                    await stall(request, writer)
            await super()._respond(request, writer)

    with Silent() as server, client_of(server, timeout=0.5) as client:
        with pytest.raises(errors.DeadlineExceededError):
            client.embed(["a"])
        assert np.array_equal(client.embed(["a"]).vectors, vectors_of(["a"]))
