"""Connections of the HTTP server: slow ones, idle ones, too many of them, and `Upgrade`."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from typing import Any

import numpy as np
import pytest
from delaying_proxy import DelayingProxy
from pydantic import SecretStr
from scripted import vectors_of
from scripted_engine import ScriptedEngine
from serving import embedded_engine, serving

from kalm_integrations import KalmClient
from modal_backend.engines.base import EngineOutput
from modal_backend.http import connection_table, connections, server
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.http.server import ServerOptions
from modal_backend.service import EmbeddingService

KEY = "correct-horse"
AUTHORIZATION = f"Authorization: Bearer {KEY}\r\n"
BODY = json.dumps({"input": "How tall is K2?"})
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
SLOW = 0.4


class SlowEngine:
    """The embedded engine, after a while."""

    def __init__(self) -> None:
        self._real = embedded_engine()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def embed(self, texts: Sequence[str], **options: Any) -> EngineOutput:
        await asyncio.sleep(SLOW)
        return await self._real.embed(texts, **options)


def post(fields: str = "", body: str = BODY, key: str = AUTHORIZATION) -> bytes:
    """A request to embed."""
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n{key}{fields}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


@contextmanager
def running_server(slow: SlowEngine | None = None, **options: Any) -> Iterator[int]:
    """A server of ours; its port."""
    service = EmbeddingService(slow or embedded_engine())
    app = create_app(service, keys=BearerKeys([SecretStr(KEY)]))
    with serving(app, **options) as url:
        yield int(url.rpartition(":")[2])


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """One answer; of status 0 if the connection ends without one."""
    with connection.makefile("rb") as file:
        first = file.readline()
        if not first:
            return 0, {}, b""
        headers = {}
        while line := file.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return int(first.split()[1]), headers, file.read(int(headers.get("content-length", 0)))


def query(port: int, request: bytes = b"") -> int:
    """The status of a query on a new connection."""
    with connect(port) as connection:
        connection.sendall(request or post())
        return answer(connection)[0]


def send_slowly(connection: socket.socket, data: bytes) -> None:
    """Send slowly, until the other side does not want more."""
    try:
        for i in range(len(data)):
            connection.sendall(data[i : i + 1])
            time.sleep(0.05)
    except OSError:
        pass


@pytest.fixture
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(connections, "STALLED_SECONDS", 0.3)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """The server may have only so many connections."""
    monkeypatch.setattr(server, "connection_limit", lambda: 6)
    return 6


class TestDeadlines:
    @pytest.mark.parametrize("sent", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
    @pytest.mark.parametrize("before", [b"", HEALTH])
    def test_a_connection_without_a_complete_header_is_closed(
        self, short_times: None, sent: bytes, before: bytes
    ) -> None:
        with (
            running_server(server_options=ServerOptions(keep_alive=1)) as port,
            connect(port) as slow,
        ):
            if before:
                slow.sendall(before)
                assert answer(slow)[0] == 200
            slow.sendall(sent)
            assert slow.recv(1) == b""

    def test_a_slow_header_is_closed(self, short_times: None) -> None:
        with running_server() as port, connect(port) as slow:
            send_slowly(slow, b"GET /health HTTP/1.1\r\nX-Slow: " + b"x" * 400)
            with pytest.raises(ConnectionError):
                for _ in range(100):
                    slow.sendall(b"x" * 10_000)

    def test_a_slow_body_gets_408(self, short_times: None) -> None:
        with running_server() as port, connect(port) as slow:
            slow.sendall(post(body=" " * 9_000)[:-9_000])
            sending = threading.Thread(target=send_slowly, args=(slow, b" " * 200))
            sending.start()
            status, headers, _ = answer(slow)
            assert (status, headers["connection"]) == (408, "close")
            sending.join()

    def test_a_slow_body_after_its_refusal_is_closed(self, short_times: None) -> None:
        with running_server() as port, connect(port) as slow:
            slow.sendall(post(key="", body=" " * 9_000)[:-9_000])
            assert answer(slow)[0] == 401
            send_slowly(slow, b" " * 200)
            with pytest.raises(ConnectionError):
                for _ in range(100):
                    slow.sendall(b" " * 10)
                    time.sleep(0.01)

    def test_a_caller_that_does_not_read_is_disconnected(self, short_times: None) -> None:
        large_answer = f"GET /openapi.json HTTP/1.1\r\nHost: x\r\n{AUTHORIZATION}\r\n".encode()
        with running_server() as port, connect(port) as connection:
            connection.settimeout(0.2)
            with pytest.raises(ConnectionError):
                for _ in range(1_000):
                    with suppress(TimeoutError):
                        connection.sendall(large_answer * 100)

    def test_idle_connections_are_kept_for_keep_alive_seconds(self) -> None:
        assert ServerOptions().keep_alive == 75
        with (
            running_server(server_options=ServerOptions(keep_alive=1)) as port,
            connect(port) as idle,
        ):
            idle.sendall(HEALTH)
            assert answer(idle)[0] == 200
            start = time.monotonic()
            assert idle.recv(1) == b""
            assert time.monotonic() - start > 0.9


class TestConnectionLimit:
    @pytest.mark.parametrize("sent", [b"", b"POST /v1/embeddings HTTP/1.1\r\nX: ", HEALTH])
    def test_connections_without_a_key_are_closed_first(self, few: int, sent: bytes) -> None:
        with running_server() as port, ExitStack() as stack:
            for _ in range(10 * few):
                connection = stack.enter_context(connect(port))
                connection.sendall(sent)
            assert [query(port) for _ in range(3)] == [200] * 3

    def test_refused_connections_are_closed_too(self, few: int) -> None:
        with running_server() as port, ExitStack() as stack:
            for _ in range(3 * few):
                connection = stack.enter_context(connect(port))
                connection.sendall(b"\0\1\2\r\n\r\n")
            assert [query(port) for _ in range(3)] == [200] * 3

    def test_a_closed_connection_gets_503_with_retry_after(self, few: int) -> None:
        with running_server() as port, ExitStack() as stack:
            first = stack.enter_context(connect(port))
            for _ in range(3 * few):
                stack.enter_context(connect(port))
            status, headers, body = answer(first)
        assert (status, headers["connection"]) == (503, "close")
        assert int(headers["retry-after"]) >= 1
        assert json.loads(body)["error"]["code"] == "service_unavailable"

    def test_requests_with_a_key_wait_for_a_connection(
        self, few: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # On a busy machine callers take their time between connecting and sending.
        monkeypatch.setattr(connection_table, "_UNAUTHORIZED_PER_SECOND", 0.1)
        with running_server(SlowEngine()) as port, ThreadPoolExecutor(5 * few) as pool:
            assert set(pool.map(lambda _: query(port), range(5 * few))) == {200}

    def test_kept_connections_end_with_their_responses_when_full(self, few: int) -> None:
        with running_server(SlowEngine()) as port, ExitStack() as stack:
            kept = [stack.enter_context(connect(port)) for _ in range(few)]
            for connection in kept:
                connection.sendall(post())
            time.sleep(SLOW / 4)  # all are busy now
            waiting = stack.enter_context(connect(port))
            waiting.sendall(post())
            answers = [answer(connection) for connection in kept]
            assert {status for status, *_ in answers} == {200}
            assert "close" in {headers.get("connection") for _, headers, _ in answers}
            assert answer(waiting)[0] == 200

    def test_the_limit_leaves_files_for_the_rest_of_the_process(self) -> None:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        try:
            assert 0 < server.connection_limit() <= 512 - 64
            server.raise_file_limit()
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, 2**20)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


UPGRADES = {
    "h2c": "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEA\r\n",
    "websocket": "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
    "other": "upgrade: TLS/1.3\r\nconnection: keep-alive, upgrade\r\n",
}


class TestUpgrade:
    @pytest.mark.parametrize("name", UPGRADES)
    def test_it_is_ignored(self, name: str) -> None:
        with running_server() as port, connect(port) as connection:
            for _ in range(3):  # on one connection, as Java's client does
                connection.sendall(post(UPGRADES[name]))
                status, _, body = answer(connection)
                assert (status, len(json.loads(body)["data"])) == (200, 1)

    def test_in_pieces(self) -> None:
        request = post(UPGRADES["h2c"])
        with running_server() as port, connect(port) as connection:
            for start in range(0, len(request), 40):
                connection.sendall(request[start : start + 40])
                time.sleep(0.01)
            assert answer(connection)[0] == 200

    def test_in_a_chunked_request(self) -> None:
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n{AUTHORIZATION}{UPGRADES['h2c']}"
        chunked = f"Transfer-Encoding: chunked\r\n\r\n{len(BODY):x}\r\n{BODY}\r\n0\r\n\r\n"
        with running_server() as port:
            assert query(port, (head + chunked).encode()) == 200

    def test_many_pipelined_upgrades_are_refused_at_once(self) -> None:
        many = HEALTH.replace(b"\r\n\r\n", f"\r\n{UPGRADES['h2c']}\r\n".encode()) * 1_000
        with running_server() as port, connect(port) as connection:
            connection.sendall(many)
            while connection.recv(65_536):
                pass
            assert query(port) == 200


@pytest.mark.parametrize(
    ("request_", "many"),
    [(HEALTH, 10_000), (post(body='{"input": 1}'), 3_000)],
    ids=["GET", "POST"],
)
def test_pipelined_requests_are_parsed_in_small_parts(
    request_: bytes, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowds = []
    completed = connections.Connection.on_response_complete

    def counting(connection: connections.Connection) -> None:
        completed(connection)
        crowds.append(len(connection.pipeline))

    monkeypatch.setattr(connections.Connection, "on_response_complete", counting)
    with running_server() as port, connect(port) as connection, ThreadPoolExecutor(1) as pool:
        sent = pool.submit(connection.sendall, request_ * many)
        with connection.makefile("rb") as answers:
            starts = (line for line in answers if b"HTTP/1.1 " in line)
            assert sum(1 for _ in islice(starts, many)) == many
        sent.result()
    assert 0 < max(crowds) <= 8192 // len(request_) + 2  # as many as are parsed in one go


class TestHeaders:
    def test_an_endless_header_gets_431(self) -> None:
        with running_server() as port, connect(port) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\n")
            for _ in range(40):
                connection.sendall(b"X-Large: " + b"x" * 2_000 + b"\r\n")
            assert answer(connection)[0] == 431

    @pytest.mark.parametrize("size", [90_000, 200_000])
    def test_a_large_header_in_one_piece_gets_431(self, size: int) -> None:
        with running_server() as port, connect(port) as connection:
            large = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Large: " + b"x" * size + b"\r\n\r\n"
            connection.sendall(large)
            assert answer(connection)[0] == 431

    def test_a_malformed_body_is_refused_and_not_logged(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        with running_server() as port:
            for _ in range(5):
                assert query(port, head + b"zz\r\n") in (400, 401)
        assert caplog.records == []

    @pytest.mark.parametrize("request_", [b"\0\1\2\r\n\r\n", b"CONNECT x:1 HTTP/1.1\r\n\r\n"])
    def test_data_that_is_not_http_gets_400(
        self, request_: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        with running_server() as port:
            assert query(port, request_) == 400
        assert caplog.records == []


@pytest.mark.parametrize("keepalive_timeout", [0.5, 5.0])
def test_no_call_is_lost_when_idle_connections_are_closed(keepalive_timeout: float) -> None:
    """At 20 ms of latency each way, with pauses around the server's second and the client's half;
    a client that keeps connections longer than the server does sends on closed ones, and retries.
    """
    app = create_app(EmbeddingService(ScriptedEngine()), keys=BearerKeys(None))
    model = ScriptedEngine.identity.model

    def calls(url: str, pause: float) -> None:
        with KalmClient(base_url=url, model=model, keepalive_timeout=keepalive_timeout) as client:
            for text in ("before", "after"):
                assert np.array_equal(client.embed([text]).vectors, vectors_of([text]))
                time.sleep(pause)

    pauses = [0.44 + 0.02 * step for step in range(6)] + [0.9 + 0.02 * step for step in range(10)]
    with (
        serving(app, ServerOptions(keep_alive=1)) as url,
        DelayingProxy(url, 0.02) as proxy,
        ThreadPoolExecutor(len(pauses)) as threads,
    ):
        for call in [threads.submit(calls, proxy.url, pause) for pause in pauses]:
            call.result()


class TestFraming:
    def test_a_trailer_is_not_read_as_a_header(self) -> None:
        head = b"GET /ready HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        with running_server() as port, connect(port) as connection:
            connection.sendall(head + f"0\r\n{AUTHORIZATION}\r\n".encode())
            assert answer(connection)[0] == 401

    def test_endless_trailers_end_the_connection(self) -> None:
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
        with running_server() as port, connect(port) as connection:
            connection.sendall(head)
            with pytest.raises(ConnectionError):
                for _ in range(200):
                    connection.sendall(b"a: b\r\n" * 10_000)
            assert query(port) == 200

    def test_a_body_in_many_small_chunks_is_a_body(self) -> None:
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY.encode())
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n{AUTHORIZATION}"
        head += "Transfer-Encoding: chunked\r\n\r\n"
        with running_server() as port:
            assert query(port, head.encode() + chunks + b"0\r\n\r\n") == 200

    def test_a_request_after_a_large_one_is_not_counted_as_its_header(self) -> None:
        large = json.dumps({"input": ["a" * 100_000], "truncate": "end"})
        with running_server() as port, connect(port) as connection:
            connection.sendall(post(body=large) + b"GET /hea")
            assert answer(connection)[0] == 200
            connection.sendall(b"lth HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer(connection)[0] == 200

    def test_an_error_is_not_sent_as_the_response_to_an_earlier_request(self) -> None:
        bad = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n{AUTHORIZATION}"
        bad += "Transfer-Encoding: chunked\r\n\r\nzz\r\n"
        with running_server(SlowEngine()) as port, connect(port) as connection:
            connection.sendall(post() + bad.encode())
            assert answer(connection)[0] in (0, 200)
