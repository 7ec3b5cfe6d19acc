"""The web door: who may pass, what is passed on, and how the platform answers by itself."""

import asyncio
import io
import socket
from pathlib import Path
from typing import Any

import aiohttp
import modal
import pytest
from modal_emulator import Emulator
from toy import server_app, toy_app

SERVER = Path(server_app.__file__).read_text()
KEYS = {"Modal-Key": "wk-emulated", "Modal-Secret": "ws-emulated"}


@pytest.fixture(scope="module")
def emulator(new_emulator: Any) -> Emulator:
    emulator: Emulator = new_emulator()
    emulator.set_secret("toy-secret", {})
    emulator.deploy(toy_app.__file__)
    return emulator


@pytest.fixture
def url(emulator: Emulator) -> str:
    return emulator.web_url("Toy", "web")


@pytest.fixture
async def http() -> Any:
    async with aiohttp.ClientSession(headers=KEYS) as session:
        yield session


async def test_without_a_proxy_token_no_container_starts(emulator: Emulator, url: str) -> None:
    wrong = {**KEYS, "Modal-Secret": "ws-guessed"}
    async with aiohttp.ClientSession() as stranger:
        for headers in ({}, wrong):
            async with stranger.post(f"{url}/echo", headers=headers) as answer:
                assert answer.status == 401
    assert emulator.starts("Toy") == 0


async def test_a_cold_function_may_answer_503(
    emulator: Emulator, url: str, http: aiohttp.ClientSession
) -> None:
    with emulator.changed(web_cold_503=True):
        async with http.post(f"{url}/echo") as answer:
            assert answer.status == 503
    await asyncio.to_thread(emulator.wait, lambda: emulator.running("Toy"))
    async with http.post(f"{url}/echo", data=b"now") as answer:
        assert await answer.read() == b"now"
    assert emulator.starts("Toy") == 1


@pytest.mark.parametrize("size", [0, 10, 3 * 1024 * 1024])
async def test_bodies_of_all_sizes(url: str, http: aiohttp.ClientSession, size: int) -> None:
    body = b"x" * size
    async with http.post(f"{url}/echo", data=io.BytesIO(body)) as answer:
        assert (answer.status, await answer.read()) == (200, body)


async def test_answers_are_streamed(url: str, http: aiohttp.ClientSession) -> None:
    async with http.get(f"{url}/stream") as answer:
        parts = [part async for part in answer.content.iter_any()]
    assert parts == [b"part 0\n", b"part 1\n", b"part 2\n"]


async def test_slow_answers_are_fetched_behind_redirects(
    emulator: Emulator, url: str, http: aiohttp.ClientSession
) -> None:
    with emulator.changed(web_redirect_after=0.3):
        async with http.post(f"{url}/slow?1", data=b"slow", allow_redirects=False) as answer:
            assert answer.status == 303
            assert "__modal_function_call_id=" in answer.headers["Location"]
        async with http.post(f"{url}/slow?1", data=b"slow") as answer:
            assert await answer.read() == b"slow"
            assert len(answer.history) >= 2


async def test_too_many_requests(emulator: Emulator, url: str, http: aiohttp.ClientSession) -> None:
    with emulator.changed(web_rate_limit=2):
        statuses = []
        for _ in range(3):
            async with http.get(f"{url}/echo") as answer:
                statuses.append(answer.status)
    assert statuses.count(429) >= 1


async def test_refusals_on_demand(
    emulator: Emulator, url: str, http: aiohttp.ClientSession
) -> None:
    emulator.refuse_web(502, times=2, headers={"Retry-After": "1"})
    statuses = []
    for _ in range(3):
        async with http.get(f"{url}/echo") as answer:
            statuses.append(answer.status)
    assert statuses == [502, 502, 200]


async def test_the_app_learns_that_its_client_hung_up(
    emulator: Emulator, url: str, http: aiohttp.ClientSession
) -> None:
    with pytest.raises(TimeoutError):
        await http.get(f"{url}/hang", timeout=aiohttp.ClientTimeout(total=0.3))
    await asyncio.to_thread(
        emulator.wait, lambda: "hung up: http.disconnect" in emulator.logs("Toy")
    )


async def test_a_request_in_flight_survives_the_kill_of_its_container(
    emulator: Emulator, url: str, http: aiohttp.ClientSession
) -> None:
    async with http.get(f"{url}/echo") as answer:
        first = answer.headers["X-Task"]

    async def kill(_: object) -> None:
        await emulator.running("Toy")[0].kill()

    emulator.inject("FunctionCallPutDataOut", kill)
    async with http.post(f"{url}/echo", data=b"again") as answer:
        assert answer.headers["X-Task"] != first
        assert await answer.read() == b"again"


async def test_an_answer_cut_short_is_seen_to_be_short(
    emulator: Emulator, url: str, http: aiohttp.ClientSession
) -> None:
    async with http.get(f"{url}/stream") as answer:
        assert await answer.content.readany() == b"part 0\n"
        await asyncio.to_thread(emulator.kill, "Toy")
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()


async def test_a_stopped_app_is_not_found(
    emulator: Emulator, url: str, http: aiohttp.ClientSession
) -> None:
    emulator.stop_app("toy")
    async with http.get(f"{url}/echo") as answer:
        assert answer.status == 404


async def test_a_server_is_reached_through_its_port(
    new_emulator: Any, http: aiohttp.ClientSession
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    emulator = new_emulator(container_env={"TOY_PORT": port})
    emulator.deploy(server_app.__file__, env={"TOY_PORT": port})
    url = emulator.web_url("Files")
    async with aiohttp.ClientSession() as stranger, stranger.get(url) as answer:
        assert answer.status == 401
    assert emulator.starts("Files") == 0
    async with http.get(f"{url}/server_app.py") as answer:
        assert await answer.text() == SERVER


def test_no_rpc_was_missing(emulator: Emulator) -> None:
    assert modal.__version__.startswith("1.6.")
    assert not emulator.unimplemented
