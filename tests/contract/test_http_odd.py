"""Unusual servers, credentials and timing: always one of our errors, and never a secret in it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from serving import FaultyServer, Received, Step, packed, plain, reply, serving, stall
from test_http_server import SlowEngine, ask

from kalm_integrations import KalmClient, errors
from kalm_integrations.codec import MEDIA_TYPE
from kalm_integrations.models import EMBEDDED
from kalm_integrations.protocol import IDENTITY_HEADER
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.service import EmbeddingService

pytestmark = pytest.mark.usefixtures("quick_retries")
MODEL = EMBEDDED.space.model
SECRET = 'sk-top"secret-1234'


def client_of(server: FaultyServer, **settings: Any) -> KalmClient:
    defaults: dict[str, Any] = {"api_key": SECRET, "model": MODEL, "max_retries": 1}
    return KalmClient(base_url=server.url, **defaults | settings)


def refused_with(content: Any, status: int = 400) -> Step:
    return reply(status, json.dumps({"error": {"message": "m", **content}}))


def bad(index: Any, reason: Any = "is odd") -> Step:
    return refused_with({"code": "invalid_input", "invalid": [{"index": index, "reason": reason}]})


DEEP = "[" * 100_000 + "]" * 100_000
ECHO = json.dumps({"error": {"message": f"wrong key: {SECRET}"}})
Transient = errors.ServiceUnavailableError
UNUSUAL: dict[str, tuple[Step, type[errors.KalmError], bool]] = {
    # name: what the server does, what the caller gets, whether the server is ours
    "an index that is text": (bad("0"), errors.InvalidInputError, True),
    "an index that is null": (bad(None), errors.InvalidInputError, True),
    "a reason that is none": (bad(0, None), errors.InvalidInputError, True),
    "deep JSON in an error": (reply(500, DEEP), Transient, True),
    "deep JSON in an answer": (reply(200, DEEP), errors.InvalidResponseError, False),
    "huge numbers": (
        plain(lambda c: c["data"][0].update(embedding=[10**400])),
        errors.InvalidResponseError,
        False,
    ),
    "a Retry-After beyond time": (
        reply(503, Retry_After="Mon, 01 Jan 99999999999999999999 00:00:00 GMT"),
        Transient,
        True,
    ),
    "a redirect to mail": (reply(307, Location="mailto:a@b"), errors.ConfigurationError, True),
    "a redirect to nowhere": (reply(307, Location="http://[x"), errors.ConfigurationError, True),
    "garbage instead of HTTP": (reply(200, Bad_Header="a\r\nnonsense"), Transient, True),
    "a key in the message": (reply(401, ECHO), errors.AuthenticationError, True),
    "a key in a page": (reply(200, f"<p>{SECRET}</p>", "text/html"), errors.KalmError, True),
    "a key at the cut": (reply(401, "x" * 190 + SECRET, "text/plain"), errors.KalmError, True),
    "a key as the type": (reply(200, "", f"text/{SECRET}"), errors.KalmError, True),
    "a key as a reason": (bad(0, f"is {SECRET}"), errors.InvalidInputError, True),
    "a key in a redirect": (
        reply(301, Location=f"/x?k={SECRET}".replace('"', "%22")),
        errors.ConfigurationError,
        True,
    ),
    "a key as the model": (
        plain(lambda c: c | {"model": SECRET}),
        errors.IdentityMismatchError,
        False,
    ),
    "a very long message": (refused_with({"message": "x" * 500_000}), errors.KalmError, True),
}


def shown(error: BaseException | None) -> str:
    return "" if error is None else f"{error!r} {error} {shown(error.__cause__)}"


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_response_becomes_one_of_our_errors_without_secrets(name: str) -> None:
    step, expected, ours = UNUSUAL[name]
    with FaultyServer([step] * 3, ours=ours) as server, client_of(server) as client:
        with pytest.raises(expected) as caught:
            client.embed(["a"])
    assert not isinstance(caught.value, errors.TransportError), caught.value
    text = shown(caught.value)
    for form in (SECRET, "sk-top", "secret-1234"):
        assert form not in text
    assert len(str(caught.value)) < 1_000


class TestCredentials:
    @pytest.mark.parametrize("key", ["schlüssel-é-猫", " padded-key \n"])
    def test_a_key_may_have_any_characters(self, key: str) -> None:
        app = create_app(EmbeddingService(SlowEngine(0)), keys=BearerKeys([SecretStr(key)]))
        with serving(app) as url, KalmClient(base_url=url, api_key=key, model=MODEL) as client:
            assert len(client.embed(["a"])) == 1

    def test_netrc_is_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "netrc").write_text("default login bob password hunter2\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        for key in (None, "k"):
            with FaultyServer() as server, client_of(server, api_key=key) as client:
                client.embed(["a"])
                sent = {request.headers.get("authorization") for request in server.received}
            assert sent == {None if key is None else "Bearer k"}

    def test_a_key_that_cannot_be_sent_is_refused_on_construction(self) -> None:
        with pytest.raises(errors.ConfigurationError, match="api_key: it holds control characters"):
            KalmClient(base_url="http://there", api_key="a\nb")
        assert KalmClient(base_url="http://there", api_key=" \n").config.api_key is None

    @pytest.mark.parametrize("url", ["http://there:99999", "http://there:abc"])
    def test_an_invalid_port_is_refused_on_construction(self, url: str) -> None:
        with pytest.raises(errors.ConfigurationError):
            KalmClient(base_url=url)


class TestServerProbe:
    """The probe of /v1/models, which decides the form of all requests."""

    @staticmethod
    def models(*answers: Step, ours: bool = True) -> FaultyServer:
        class Server(FaultyServer):
            async def _respond(self, request: Received, writer: asyncio.StreamWriter) -> None:
                step = next(steps, None) if request.path.endswith("/models") else None
                await (step(request, writer) if step else super()._respond(request, writer))

        steps = iter(answers)
        return Server(ours=ours)

    def test_concurrent_callers_share_one_probe(self) -> None:
        async def slow_refusal(request: Received, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(0.3)
            await reply(401, **{IDENTITY_HEADER.replace("-", "_"): "abc"})(request, writer)

        with self.models(*[slow_refusal] * 9) as server, client_of(server) as client:

            async def main() -> list[Any]:
                calls = (client.aembed([f"text {i}"]) for i in range(6))
                return await asyncio.gather(*calls, return_exceptions=True)

            results = asyncio.run(main())
        assert {type(result) for result in results} == {errors.AuthenticationError}
        assert len(server.received) == 1

    def test_our_server_under_another_path_is_recognized(self) -> None:
        elsewhere = reply(404, **{IDENTITY_HEADER.replace("-", "_"): "abc"})
        with self.models(elsewhere) as server, client_of(server) as client:
            with pytest.raises(errors.NotFoundError, match=rf"not at {server.url}/v1\. Check base"):
                client.embed(["a"])
            assert len(server.received) == 1

    @pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/embeddings", "/v1/embeddings/"])
    def test_base_url_forms(self, path: str) -> None:
        with (
            FaultyServer() as server,
            KalmClient(base_url=server.url + path, model=MODEL) as client,
        ):
            assert len(client.embed(["a"])) == 1

    def test_the_probe_uses_time_of_the_deadline(self) -> None:
        async def slow(request: Received, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(0.5)
            await FaultyServer._respond(server, request, writer)

        with self.models(slow) as server, client_of(server, timeout=5) as client:
            client.embed(["a"])
            assert float(server.posted[0].headers["x-kalm-timeout"]) < 4.6


class TestConcurrency:
    def test_closing_during_a_call_raises_one_of_our_errors(self) -> None:
        with FaultyServer([stall] * 3) as server, client_of(server) as client:
            caught: list[BaseException] = []

            def work() -> None:
                try:
                    client.embed(["a"])
                except errors.KalmError as error:
                    caught.append(error)

            thread = threading.Thread(target=work)
            thread.start()
            while not server.posted:
                time.sleep(0.01)
            client.close()
            thread.join(10)
            assert [type(error) for error in caught] == [errors.KalmError]
            assert "closed during the call" in str(caught[0])

    def test_a_refused_first_response_sets_no_identity(self) -> None:
        with (
            FaultyServer(
                [plain(lambda c: c["data"][0].update(embedding=[9.0, 0, 0]))], ours=False
            ) as server,
            client_of(server, model="some/model") as client,
        ):
            with pytest.raises(errors.InvalidResponseError, match=r"length 9\.0"):
                client.embed(["a"])
            assert client.embed(["a"]).vectors.shape == (1, 512)

    def test_media_types_with_parameters(self) -> None:
        async def with_charset(request: Received, writer: asyncio.StreamWriter) -> None:
            class Renamed:
                def write(self, data: bytes) -> None:
                    writer.write(
                        data.replace(MEDIA_TYPE.encode(), b"Application/VND.safetensors; charset=x")
                    )

                async def drain(self) -> None: ...

            await packed()(request, Renamed())  # type: ignore[arg-type]

        with FaultyServer([with_charset]) as server, client_of(server) as client:
            assert len(client.embed(["a"])) == 1


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(create_app(EmbeddingService(SlowEngine(0)), keys=BearerKeys(None))) as url:
        yield url


class TestServer:
    @pytest.mark.parametrize(
        ("accept", "kind"),
        [
            (MEDIA_TYPE, MEDIA_TYPE),
            (f"application/json;q=0.5, {MEDIA_TYPE.upper()}; q=1", MEDIA_TYPE),
            (f"{MEDIA_TYPE};q=0", "application/json"),
            (f"{MEDIA_TYPE};q=0.5, application/json;q=0.4", MEDIA_TYPE),
            (f"{MEDIA_TYPE};q=0.4, application/json;q=0.5", "application/json"),
            (f"{MEDIA_TYPE};q=0.5, */*;q=0.4", MEDIA_TYPE),
            (f"{MEDIA_TYPE};q=0.5, */*", "application/json"),
            (f"{MEDIA_TYPE}, */*", "application/json"),  # JSON is among "*/*": a tie
            (f"{MEDIA_TYPE}, application/json", "application/json"),
            (f"application/*;q=0.9, application/json;q=0.1, {MEDIA_TYPE};q=0.2", MEDIA_TYPE),
            ("application/*, application/json;q=0", MEDIA_TYPE),
            (f"{MEDIA_TYPE};q=much", "application/json"),
            (f"{MEDIA_TYPE};q=2", "application/json"),
            ("text/html", "application/json"),
            (",;,;q=,", "application/json"),
            ("*/*", "application/json"),
        ],
    )
    def test_accept(self, url: str, accept: str, kind: str) -> None:
        answer = ask(f"{url}/v1/embeddings", {"input": "a"}, key=None, Accept=accept)
        assert answer.headers["Content-Type"] == kind

    def test_every_error_is_counted_by_its_code(self) -> None:
        app = create_app(
            EmbeddingService(SlowEngine(0, KeyError("x"))), keys=BearerKeys([SecretStr("k")])
        )
        with serving(app) as url:
            asks: list[Callable[[], Any]] = [
                lambda: ask(f"{url}/v1/embeddings", {"input": "a"}, key="wrong"),
                lambda: ask(f"{url}/v1/nothing", key="k"),
                lambda: ask(f"{url}/v1/embeddings", DEEP.encode(), key="k"),
                lambda: ask(f"{url}/v1/embeddings", {"input": "a"}, key="k"),
            ]
            answers = [each() for each in asks]
            page = ask(f"{url}/metrics", key="k").body.decode()
        codes = ["invalid_api_key", "not_found", "request_too_large", "unexpected"]
        assert [answer.error["code"] for answer in answers] == codes
        for answer, code in zip(answers, codes, strict=True):
            assert answer.headers[IDENTITY_HEADER] == EMBEDDED.space.fingerprint
            assert f'kalm_requests_total{{code="{code}"}} 1.0' in page
