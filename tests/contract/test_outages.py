"""A service that is not there, and one that goes down and comes back: real processes and ports;
gateways in front of it in virtual time."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import virtual_time
from scripted import ScriptedTransport, vectors_of
from yarl import URL

from kalm_integrations import KalmClient, errors, retry, session
from kalm_integrations.batching import Batch
from kalm_integrations.config import ClientConfig
from kalm_integrations.protocol import EmbedRequest
from kalm_integrations.transports.http_pool import HttpResponse
from kalm_integrations.transports.openai_compat import error_from_response

TESTS = Path(__file__).parent.parent
CALLERS = 48
CALLS = 180
OUTAGE = 10.0
"""Seconds. A client waits longer than a service takes to restart; that takes this test its time."""


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


@contextmanager
def service(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server process, killed at the end at the latest."""
    process = subprocess.Popen([sys.executable, "-m", "stock_server", str(port)], cwd=TESTS)
    try:
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


def test_no_call_is_lost_in_an_outage_of_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    client = KalmClient(base_url=f"http://127.0.0.1:{port}", model="kalm", timeout=60)
    numbers, begun = iter(range(CALLS)), asyncio.Event()

    async def caller() -> list[int]:
        lost = []
        for number in numbers:
            if number == CALLERS:
                begun.set()
            text = f"text {number}"
            try:
                vectors = (await client.aembed([text])).vectors
                assert np.array_equal(vectors, vectors_of([text]))
            except errors.KalmError:
                lost.append(number)
            await asyncio.sleep(0.1)
        return lost

    async def main() -> list[int]:
        with service(port):
            await client.aembed(["a"])
            callers = asyncio.gather(*(caller() for _ in range(CALLERS)))
            await begun.wait()
        await asyncio.sleep(OUTAGE)
        with service(port):
            start = time.monotonic()
            lost = [number for each in await callers for number in each]
            await client.aclose()
        assert time.monotonic() - start < 30
        return lost

    with caplog.at_level(logging.WARNING, logger="kalm_integrations.retry"):
        assert asyncio.run(main()) == []
    assert len([r for r in caplog.records if r.name == "kalm_integrations.retry"]) == 2
    down, up = (r.getMessage() for r in caplog.records if r.name == "kalm_integrations.retry")
    assert "retried" in down
    assert "again" in up


GATEWAYS = {
    "nginx": (502, "<html><head><title>502 Bad Gateway</title></head>...</html>"),
    "Envoy, refused": (
        503,
        "upstream connect error or disconnect/reset before headers. reset reason: connection "
        "failure, transport failure reason: delayed connect error: 111",
    ),
    "Envoy, no host": (503, "no healthy upstream"),
    "ALB": (503, "<html><head><title>503 Service Temporarily Unavailable</title></head></html>"),
    "ALB, a time limit": (504, "<html><head><title>504 Gateway Time-out</title></head></html>"),
    "Caddy": (502, ""),
    "Kong": (503, '{"message":"name resolution failed"}'),
    "llama.cpp, loading": (503, '{"error":{"code":503,"message":"Loading model"}}'),
    "Cloudflare": (521, "error code: 521"),
}


class TestGateway:
    """It answers for a service that it does not reach."""

    URL = URL("https://kalm.example/v1/embeddings")

    def error(self, name: str, **headers: str) -> errors.KalmError:
        status, body = GATEWAYS[name]
        response = HttpResponse(status, headers, bytearray(body.encode()), "1", self.URL)
        return error_from_response(response, [])

    @pytest.mark.parametrize("name", GATEWAYS)
    def test_no_call_is_lost_in_ten_seconds(
        self, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = ClientConfig(base_url="http://a", model="kalm", timeout=60)
        call = session.CallSettings(role="document", timeout=60)

        async def main() -> None:
            now = asyncio.get_running_loop().time
            for module in (retry, session):
                monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=now))

            def refuse(_: EmbedRequest) -> None:
                if 1 < now() < 1 + OUTAGE:
                    raise self.error(name)

            transport = ScriptedTransport(refuse=refuse, delay=lambda _: 0.05, space=None)
            requests = session.Session(config, transport)

            async def caller(number: int) -> None:
                while now() < 2 + OUTAGE:
                    await requests.send(Batch([f"text {number}"], [[0]]), call)
                    await asyncio.sleep(0.1)

            await asyncio.gather(*(caller(number) for number in range(CALLERS)))
            assert len(transport.requests) - transport.answered > CALLERS

        with caplog.at_level(logging.WARNING, logger="kalm_integrations.retry"):
            virtual_time.run(main())
        down, up = (r.getMessage() for r in caplog.records if r.name == "kalm_integrations.retry")
        assert f"HTTP {GATEWAYS[name][0]} from {self.URL}" in down
        assert "again" in up

    def test_a_service_that_says_when_to_return_is_there(self) -> None:
        error = self.error("ALB", **{"Retry-After": "1"})
        assert isinstance(error, errors.ServiceUnavailableError)
        assert not error.is_outage

    def test_a_service_that_serves_some_requests_is_retried_as_often_as_ever(self) -> None:
        error, policy = self.error("nginx"), retry.RetryPolicy(6, 1)
        began = time.monotonic()
        assert policy.is_outage(error, began)
        policy.succeeded(began)
        assert not policy.is_outage(error, began)


class TestNeverReached:
    """It may be a wrong address: the error comes at once and names the cause."""

    @staticmethod
    def fails(base_url: str, caplog: pytest.LogCaptureFixture) -> str:
        start = time.monotonic()
        with KalmClient(base_url=base_url, model="kalm") as client:
            with pytest.raises(errors.ConnectionFailedError) as caught:
                client.embed(["a"])
            assert time.monotonic() - start < 2
            with pytest.raises(errors.ConnectionFailedError):
                client.warm_up(timeout=1800)
        assert time.monotonic() - start < 4
        assert "starting" not in caplog.text + str(caught.value)
        return caught.value.message

    def test_a_refused_connection(self, caplog: pytest.LogCaptureFixture) -> None:
        url = f"http://127.0.0.1:{free_port()}"
        assert self.fails(url, caplog) == f"connection refused: is the service running at {url}?"

    def test_a_refused_connection_to_all_addresses_of_a_name(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        url = f"http://localhost:{free_port()}"
        assert self.fails(url, caplog) == f"connection refused: is the service running at {url}?"

    def test_an_unknown_host_name(self, caplog: pytest.LogCaptureFixture) -> None:
        message = self.fails("http://kalm.invalid:8000", caplog)
        assert "kalm.invalid:8000 cannot be resolved" in message

    def test_a_server_that_ends_the_tls_handshake(self, caplog: pytest.LogCaptureFixture) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with closing_connections(server):
                message = self.fails(f"https://127.0.0.1:{port}", caplog)
        assert f"127.0.0.1:{port}" in message


@contextmanager
def closing_connections(server: socket.socket) -> Iterator[None]:
    """Accept and close each connection."""
    import threading

    def run() -> None:
        with suppress(OSError):
            while True:
                server.accept()[0].close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_server_that_accepts_and_is_silent_ends_with_connect_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        with KalmClient(base_url=url, model="kalm", connect_timeout=0.3) as client:
            with pytest.raises(errors.ConnectionFailedError, match=r"connect_timeout=0\.3 s"):
                client.embed(["a"])


def test_max_retries_0_waits_for_no_outage() -> None:
    port = free_port()
    with KalmClient(base_url=f"http://127.0.0.1:{port}", model="kalm", max_retries=0) as client:
        with service(port):
            client.embed(["a"])
        for _ in range(2):
            with pytest.raises(errors.ConnectionFailedError) as caught:
                client.embed(["a"])
            assert caught.value.retries == 0
