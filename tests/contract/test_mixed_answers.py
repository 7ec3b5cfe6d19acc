"""An answer belongs to its request: whatever an intermediary does, no caller gets a wrong vector.

The service, its HTTP API and the client are the real ones; the proxy between them misbehaves. Each
text has a vector of its own, so that a wrong one shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mixing_proxy import (
    Fault,
    MixingProxy,
    bodies_swapped,
    damaged,
    late_duplicate,
    stale_first,
    swapped,
)
from scripted import DIMENSIONS, vectors_of
from scripted_engine import ScriptedEngine
from serving import serving

from kalm_integrations import KalmClient
from kalm_integrations.errors import (
    ConnectionFailedError,
    CorruptedAnswerError,
    IdentityMismatchError,
)
from kalm_integrations.models import EMBEDDED
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.service import EmbeddingService

pytestmark = pytest.mark.usefixtures("quick_retries")
CALLS = 16


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    app = create_app(EmbeddingService(ScriptedEngine()), keys=BearerKeys(None))
    with serving(app) as url:
        yield url


def outcome(client: KalmClient, number: int, texts: int = 2) -> Any:
    """Of one call: "right", "wrong", or the class of the error."""
    asked = [f"text {number}.{i}" for i in range(texts)]
    try:
        vectors = client.embed(asked).vectors
    except Exception as error:
        return type(error)
    return "right" if np.array_equal(vectors, vectors_of(asked)) else "wrong"


async def outcomes(client: KalmClient, at_a_time: int) -> list[Any]:
    """Of `CALLS` calls."""
    results: list[Any] = []
    for start in range(0, CALLS, at_a_time):
        calls = (
            asyncio.to_thread(outcome, client, number) for number in range(start, start + at_a_time)
        )
        results += await asyncio.gather(*calls)
    return results


def flipped(bit: int) -> Fault:
    def flip(body: bytes) -> bytes:
        changed = bytearray(body)
        changed[bit // 8 % len(body)] ^= 1 << bit % 8
        return bytes(changed)

    return damaged(flip)


def reversed_rows(body: bytes) -> bytes:
    row = 2 * DIMENSIONS
    return body[: -2 * row] + body[-row:] + body[-2 * row : -row]


@pytest.mark.parametrize("at_a_time", [1, 2, 8])
@pytest.mark.parametrize("fault", [swapped, bodies_swapped, stale_first])
async def test_a_response_to_another_request_is_never_accepted(
    server: str, fault: Fault, at_a_time: int
) -> None:
    """The fault never ends: a call gets its own vectors by a retry, or an error."""
    with MixingProxy(server, fault) as proxy, KalmClient(base_url=proxy.url, **OURS) as client:
        results = await outcomes(client, at_a_time)
    assert set(results) <= {"right", CorruptedAnswerError, ConnectionFailedError}


@pytest.mark.parametrize("at_a_time", [1, 8])
async def test_duplicated_responses_cause_retries_but_no_failure(
    server: str, at_a_time: int
) -> None:
    """After the first of them each request has a connection of its own."""
    with (
        MixingProxy(server, late_duplicate) as proxy,
        KalmClient(base_url=proxy.url, **OURS) as client,
    ):
        assert set(await outcomes(client, at_a_time)) == {"right"}


@pytest.mark.parametrize("bit", [3, 100, 259, 262, 1_000, 3_001, 6_000, 10_007])
def test_a_response_with_a_flipped_bit_is_retried(server: str, bit: int) -> None:
    with (
        MixingProxy(server, flipped(bit)) as proxy,
        KalmClient(base_url=proxy.url, **OURS) as client,
    ):
        assert [outcome(client, number) for number in range(4)] == ["right"] * 4
        assert proxy.answers == 8


def test_a_response_with_swapped_rows_is_retried(server: str) -> None:
    with (
        MixingProxy(server, damaged(reversed_rows)) as proxy,
        KalmClient(base_url=proxy.url, **OURS) as client,
    ):
        assert outcome(client, 1) == "right"
        assert proxy.answers == 2


@pytest.mark.parametrize("missing", [1, 3])
def test_the_first_response_identifies_the_server_if_its_probe_failed(
    server: str, missing: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The answers say whose they are: each is verified, the first as well."""

    async def unchanged(_: MixingProxy, answer: Any, send: Any) -> None:
        await send(answer)

    with (
        MixingProxy(server, unchanged, missing_models=missing) as proxy,
        KalmClient(base_url=proxy.url, **OURS) as client,
    ):
        assert [outcome(client, number) for number in range(5)] == ["right"] * 5
    assert "unverified" not in caplog.text
    with (
        MixingProxy(server, unchanged, missing_models=missing) as proxy,
        KalmClient(base_url=proxy.url, **OURS | {"expected_identity": OTHER}) as client,
    ):
        assert outcome(client, 0) is IdentityMismatchError


def test_warm_up_with_a_failed_probe_does_not_change_the_expected_identity(
    server: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def unchanged(_: MixingProxy, answer: Any, send: Any) -> None:
        await send(answer)

    space = EMBEDDED.space
    with (
        MixingProxy(server, unchanged, missing_models=1) as proxy,
        KalmClient(base_url=proxy.url, **OURS, expected_identity=space) as client,
    ):
        assert client.warm_up().space == space
        assert outcome(client, 0) == "right"
        assert client.warm_up().space == space
    assert "unverified" not in caplog.text


OURS: dict[str, Any] = {"model": EMBEDDED.space.model, "timeout": 30}
OTHER = EMBEDDED.space.to_dict() | {"revision": "another"}
