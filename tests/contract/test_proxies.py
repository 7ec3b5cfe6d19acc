"""Proxies of the environment: real ones, for HTTP, for a tunnel and for SOCKS; and NO_PROXY."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import proxy_bypass_environment

import httpx2
import numpy as np
import pytest
import trustme
from loopback_server import LoopbackServer
from scripted import vectors_of
from serving import FaultyServer, Received, reply, serving
from stock_server import StockServer
from yarl import URL

from kalm_integrations import KalmClient, errors
from kalm_integrations.transports.proxies import bypassed, proxy_of

PASSWORD = "hunter2@/:%"
QUOTED = "hunter2%40%2F%3A%25"
Variables = Callable[..., None]


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> Variables:
    """Sets variables; there are no others about proxies."""
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    return lambda **values: [monkeypatch.setenv(*each) for each in values.items()] and None


@dataclass
class Tunnel(LoopbackServer):
    """A proxy for CONNECT and for SOCKS5, to whatever is named, or to `target`."""

    target: str | None = None
    password: str | None = None
    asked_for: list[str] = field(default_factory=list)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first = await reader.readexactly(1)
            connect = self._socks if first == b"\x05" else self._http
            if address := await connect(reader, writer):
                await _pipe_both(reader, writer, *address)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _http(self, reader: Any, writer: Any) -> tuple[str, int] | None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if self.password is not None:
            wanted = base64.b64encode(f"me:{self.password}".encode()).decode()
            if f"Proxy-Authorization: Basic {wanted}\r\n" not in head:
                writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                return None
        self.asked_for.append(head.split()[1])
        writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
        return self._address(head.split()[1])

    async def _socks(self, reader: Any, writer: Any) -> tuple[str, int] | None:
        methods = await reader.readexactly((await reader.readexactly(1))[0])
        if self.password is None:
            writer.write(b"\x05\x00")
        elif 2 in methods:
            writer.write(b"\x05\x02")
            await reader.readexactly(1)
            user = await reader.readexactly((await reader.readexactly(1))[0])
            password = await reader.readexactly((await reader.readexactly(1))[0])
            right = (user, password) == (b"me", self.password.encode())
            writer.write(b"\x01\x00" if right else b"\x01\x01")
            if not right:
                return None
        else:
            writer.write(b"\x05\xff")
            return None
        kind = (await reader.readexactly(4))[3]
        if kind == 3:
            host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        else:
            host = socket.inet_ntoa(await reader.readexactly(4))
        place = f"{host}:{int.from_bytes(await reader.readexactly(2))}"
        self.asked_for.append(place)
        writer.write(b"\x05\x00\x00\x01" + bytes(6))
        return self._address(place)

    def _address(self, place: str) -> tuple[str, int]:
        url = URL(self.target or f"http://{place}")
        return url.host or "", url.port or 0


async def _pipe_both(reader: Any, writer: Any, host: str, port: int) -> None:
    far_reader, far_writer = await asyncio.open_connection(host, port)

    async def pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            sink.write(data)
            await sink.drain()
        sink.close()

    try:
        await asyncio.gather(pipe(reader, far_writer), pipe(far_reader, writer))
    finally:
        far_writer.close()


def embeds(base_url: str, **options: Any) -> bool:
    with KalmClient(base_url=base_url, **{"model": "kalm", "max_retries": 0, **options}) as client:
        return np.array_equal(client.embed(["a", "b"]).vectors, vectors_of(["a", "b"]))


class TestHTTP:
    @pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
    @pytest.mark.parametrize("form", ["http://{}", "{}", " {}\n", "HTTP://{}/"])
    def test_with_and_without_a_scheme(self, name: str, form: str, variables: Variables) -> None:
        with StockServer() as proxy:
            variables(**{name: form.format(proxy.url.removeprefix("http://"))})
            assert embeds("http://kalm.invalid")
            assert proxy.posted[-1].path == "http://kalm.invalid/v1/embeddings"

    @pytest.mark.parametrize("form", [f"http://me:{QUOTED}@{{}}", f"me:{QUOTED}@{{}}"])
    def test_the_password_goes_to_the_proxy(self, form: str, variables: Variables) -> None:
        with StockServer() as proxy:
            variables(http_proxy=form.format(proxy.url.removeprefix("http://")))
            assert embeds("http://kalm.invalid")
        expected = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        for request in proxy.received:
            assert request.headers["proxy-authorization"] == f"Basic {expected}"

    def test_tls_goes_through_a_tunnel(
        self, variables: Variables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(tmp_path / "root.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "root.pem"))
        certificate = authority.issue_cert("kalm.invalid")
        with certificate.private_key_and_cert_chain_pem.tempfile() as both:
            with serving(answer, ssl_certfile=both) as url, Tunnel(url, PASSWORD) as tunnel:
                variables(https_proxy=tunnel.url.replace("//", f"//me:{QUOTED}@"))
                assert embeds("https://kalm.invalid:8443")
        assert set(tunnel.asked_for) == {"kalm.invalid:8443"}

    def test_a_proxy_that_does_not_reach_the_service_reports_an_outage(
        self, variables: Variables
    ) -> None:
        with FaultyServer([reply(503)] * 99) as proxy:
            variables(https_proxy=proxy.url)
            with pytest.raises(errors.ConnectionFailedError, match=r"https_proxy.*503") as caught:
                embeds("https://kalm.invalid", max_retries=6)
        assert caught.value.is_outage

    def test_a_wrong_password_is_an_error_at_once(self, variables: Variables) -> None:
        with Tunnel(password="right") as tunnel:
            variables(https_proxy=tunnel.url.replace("//", f"//me:{QUOTED}@"))
            with pytest.raises(errors.ConfigurationError, match=r"https_proxy.*407") as caught:
                embeds("https://kalm.invalid", max_retries=6)
        assert_hidden(caught.value)


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI server of OpenAI's API."""
    if scope["type"] != "http":
        return
    body = b""
    while (message := await receive()).get("more_body") or message.get("body"):
        body += message["body"]
        if not message.get("more_body"):
            break
    status, content = StockServer()._answer(Received(scope["method"], scope["path"], {}, body))
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


class TestSOCKS:
    @pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
    def test_the_proxy_resolves_the_name(self, scheme: str, variables: Variables) -> None:
        with StockServer() as server, Tunnel(server.url, PASSWORD) as tunnel:
            variables(ALL_PROXY=tunnel.url.replace("http://", f"{scheme}://me:{QUOTED}@"))
            assert embeds("http://kalm.invalid:81")
        assert set(tunnel.asked_for) == {"kalm.invalid:81"}

    def test_a_wrong_password_is_named(self, variables: Variables) -> None:
        with Tunnel(password="right") as tunnel:
            variables(http_proxy=tunnel.url.replace("http://", f"socks5://me:{QUOTED}@"))
            with pytest.raises(errors.ConnectionFailedError, match="http_proxy") as caught:
                embeds("http://kalm.invalid")
        assert_hidden(caught.value)

    def test_a_proxy_that_is_not_there_is_named(self, variables: Variables) -> None:
        variables(http_proxy="socks5://127.0.0.1:9")
        with pytest.raises(errors.ConnectionFailedError, match=r"127\.0\.0\.1:9, .*http_proxy"):
            embeds("http://kalm.invalid")

    def test_a_proxy_of_another_kind_is_named(self, variables: Variables) -> None:
        with FaultyServer() as server:
            variables(http_proxy=server.url.replace("http", "socks5"))
            with pytest.raises(errors.ConnectionFailedError, match="http_proxy"):
                embeds("http://kalm.invalid", connect_timeout=0.5)

    def test_without_its_package_the_error_names_the_extra(
        self, variables: Variables, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "aiohttp_socks", None)
        variables(https_proxy="socks5://me:hunter2@127.0.0.1:9")
        with pytest.raises(errors.ConfigurationError, match=r"https_proxy.*\[socks\]") as caught:
            embeds("https://kalm.invalid")
        assert_hidden(caught.value)


BAD = [
    "http://",
    "://me:hunter2@proxy",
    "http://me:hunter2@",
    "http://me:hunter2@proxy:99999",
    "http://me:hunter2@proxy:port",
    "http://me:hunter2@[::1",
    "http://me:hunter2@pro xy:1",
    "ftp://me:hunter2@proxy:1",
    "http://me:hunter2@" + "x" * 70 + ".example:1",
    "me:hunter2:3128",
]


class TestBadValues:
    @pytest.mark.parametrize("value", BAD)
    def test_they_are_refused_by_the_name_of_the_variable(
        self, value: str, variables: Variables
    ) -> None:
        variables(HTTPS_PROXY=value)
        start = time.monotonic()
        with pytest.raises(errors.ConfigurationError, match="HTTPS_PROXY") as caught:
            embeds("https://kalm.invalid", max_retries=6)
        assert time.monotonic() - start < 2
        assert_hidden(caught.value)

    def test_a_proxy_that_is_not_there_is_named(self, variables: Variables) -> None:
        for scheme in ("http", "https"):
            variables(**{f"{scheme}_proxy": "me:hunter2@127.0.0.1:9"})
            start = time.monotonic()
            with pytest.raises(errors.ConnectionFailedError) as caught:
                embeds(f"{scheme}://kalm.invalid", max_retries=6)
            assert time.monotonic() - start < 2
            assert f"refused: is 127.0.0.1:9, the proxy of {scheme}_proxy" in str(caught.value)
            assert_hidden(caught.value)

    def test_a_proxy_that_never_opens_the_tunnel_ends_with_connect_timeout(
        self, variables: Variables
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            variables(https_proxy=f"127.0.0.1:{silent.getsockname()[1]}")
            with pytest.raises(errors.ConnectionFailedError, match=r"https_proxy.*0\.3 s"):
                embeds("https://kalm.invalid", connect_timeout=0.3)

    def test_an_empty_value_is_none(self, variables: Variables) -> None:
        variables(http_proxy="", HTTPS_PROXY=" ")
        assert proxy_of(URL("http://a")) is proxy_of(URL("https://a")) is None


def assert_hidden(error: BaseException) -> None:
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    ours = [f for f in shown.stack if "kalm_integrations" in f.filename]
    for text in (str(error), repr(error), repr(error.__cause__), *(str(f.locals) for f in ours)):
        assert "hunter2" not in text


NO_PROXY = [
    # no_proxy, url, whether it is reached directly
    ("example.com", "http://example.com", True),
    ("example.com", "http://a.example.com", True),
    ("example.com", "http://notexample.com", False),
    (".example.com", "http://a.example.com", True),
    ("*.example.com", "http://a.example.com", True),
    ("EXAMPLE.com", "http://Example.COM", True),
    ("example.com.", "http://example.com", True),
    ("a, b ,c", "http://b", True),
    ("a b", "http://b", True),
    ("*", "http://b", True),
    ("", "http://b", False),
    (",", "http://b", False),
    (".", "http://b", False),
    ("example.com:8000", "http://example.com:8000", True),
    ("example.com:8000", "http://example.com:8001", False),
    ("example.com:80", "http://example.com", True),
    ("example.com:443", "https://a.example.com", True),
    ("example.com:443", "http://example.com", False),
    ("https://example.com", "https://example.com", True),
    ("https://example.com", "http://example.com", False),
    ("http://example.com:81", "http://example.com:81", True),
    ("all://example.com", "http://example.com", True),
    ("10.0.0.0/8", "http://10.1.2.3", True),
    ("10.0.0.0/8", "http://11.1.2.3", False),
    ("10.1.0.0/8", "http://10.9.2.3", True),
    ("10.0.0.0/8", "http://a10.0.0.1.example", False),
    ("10.0.0.0/99", "http://10.0.0.1", False),
    ("127.0.0.1", "http://127.0.0.1:8000", True),
    ("127.0.0.1:8000", "http://127.0.0.1:8000", True),
    ("127.0.0.1:8000", "http://127.0.0.1:8001", False),
    ("27.0.0.1", "http://127.0.0.1", False),
    ("0.0.1", "http://127.0.0.1", False),
    ("::1", "http://[::1]:8000", True),
    ("[::1]", "http://[::1]:8000", True),
    ("[::1]:8000", "http://[::1]:8000", True),
    ("[::1]:8000", "http://[::1]:8001", False),
    ("fd00::/8", "http://[fd12::1]", True),
    ("fd00::/8", "http://10.0.0.1", False),
    ("localhost", "http://localhost:9", True),
]


class TestNoProxy:
    @pytest.mark.parametrize(("no_proxy", "url", "direct"), NO_PROXY)
    @pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
    def test_no_proxy(
        self, no_proxy: str, url: str, direct: bool, name: str, variables: Variables
    ) -> None:
        variables(**{name: no_proxy, "ALL_PROXY": "http://proxy:1"})
        assert (proxy_of(URL(url)) is None) is direct

    @pytest.mark.parametrize(("no_proxy", "url", "direct"), NO_PROXY)
    def test_what_urllib_or_httpx_reaches_directly_is_reached_directly(
        self, no_proxy: str, url: str, direct: bool, variables: Variables
    ) -> None:
        """With exceptions: part of an address, and a dot."""
        there = URL(url)
        if no_proxy in ("0.0.1", "."):
            return
        if proxy_bypass_environment(f"{there.host}:{there.port}", {"no": no_proxy}):
            assert bypassed(there.host or "", there.port, there.scheme, no_proxy)
        variables(NO_PROXY=no_proxy, ALL_PROXY="http://proxy:1")
        client = httpx2.Client()
        if client._transport_for_url(httpx2.URL(url)) is client._transport:
            assert proxy_of(there) is None

    def test_small_letters_win(self, variables: Variables) -> None:
        variables(no_proxy="a", NO_PROXY="b", http_proxy="http://one:1", HTTP_PROXY="http://two:1")
        assert proxy_of(URL("http://a")) is None
        proxy = proxy_of(URL("http://b"))
        assert proxy is not None
        assert (proxy.url.host, proxy.source) == ("one", "http_proxy")
