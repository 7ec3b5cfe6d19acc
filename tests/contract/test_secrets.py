"""The literal secrets, looked for wherever an application may write something down."""

from __future__ import annotations

import asyncio
import copy
import logging
import pickle
import traceback
from typing import Any

import pytest
from langchain_core.load import dumpd, dumps
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from serving import FaultyServer, Step, reply, reset, stall

from kalm_integrations import KalmClient, KalmModalEmbeddings
from kalm_integrations import llama_index as ours_for_llama_index
from kalm_integrations.codec import MEDIA_TYPE
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import ConfigurationError, KalmError
from kalm_integrations.models import EMBEDDED
from kalm_integrations.protocol import ECHO_HEADER
from kalm_integrations.transports.http import HttpTransport

pytestmark = pytest.mark.usefixtures("quick_retries")
SECRETS = {"api_key": "hunter2-a", "modal_key": "hunter2-b", "modal_secret": "hunter2-c"}
KINDS: list[type[KalmClient]] = [
    KalmClient,
    KalmModalEmbeddings,
    ours_for_llama_index.KalmModalEmbeddings,
]


def assert_clean(*written: object) -> None:
    for what in written:
        text = what.decode("latin-1") if isinstance(what, bytes) else str(what)
        assert "hunter2" not in text, text[:2000]


def client_of(
    kind: type[KalmClient], url: str = "http://127.0.0.1:1", **settings: Any
) -> KalmClient:
    return kind(base_url=url, model=EMBEDDED.space.model, **SECRETS, **settings)


def config_of(client: Any) -> ClientConfig:
    """Of a client or an adapter, which holds one."""
    config: ClientConfig = getattr(client, "client", client).config
    return config


@pytest.fixture(autouse=True)
def nothing_in_the_logs(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.DEBUG)
    yield
    assert_clean(caplog.text, *(vars(record) for record in caplog.records))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__module__)
def test_objects_contain_no_secret(kind: type[KalmClient]) -> None:
    client = client_of(kind)
    config = config_of(client)
    session = HttpTransport(config)
    assert_clean(repr(client), str(client), f"{client!r:>9}", repr(vars(client)))
    assert_clean(config.model_dump(), config.model_dump_json(), repr(config), str(config))
    assert_clean(pickle.dumps(client), pickle.dumps(copy.deepcopy(client)))
    assert_clean(repr(session), repr(session._pool._headers))
    assert_clean(client.vector_identity, client.cache_namespace)


def test_langchain_serializes_no_secret() -> None:
    embeddings = client_of(KalmModalEmbeddings)
    assert_clean(dumpd(embeddings), dumps(embeddings), dumps({"within": [embeddings]}))


def test_llama_index_serializes_no_secret() -> None:
    class Recorder(BaseEventHandler):
        def handle(self, event: Any, **_: Any) -> None:
            seen.append(event.model_dump_json())

    seen: list[str] = []
    recorder, root = Recorder(), get_dispatcher()
    root.add_event_handler(recorder)
    try:
        with FaultyServer() as server:
            model: Any = client_of(ours_for_llama_index.KalmModalEmbeddings, server.url)
            model.get_query_embedding("q")
            asyncio.run(model.aget_text_embedding_batch(["d"]))
    finally:
        root.event_handlers.remove(recorder)
    assert len(seen) == 4
    assert_clean(*seen, model.to_dict(), model.to_json(), model.json())


FAILURES: dict[str, Step | None] = {
    "nobody listens": None,
    "refused": reply(401, '{"error": {"message": "no"}}'),
    "broken": reset,
    "no time": stall,
    "not ours": reply(200, "<html>", "text/html"),
    "elsewhere": reply(302, Location="http://elsewhere/"),
    "wrong vectors": reply(200, b"garbage", "application/vnd.kalm.safetensors"),
    "server error": reply(500, "oops"),
}


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__module__)
def test_errors_and_tracebacks_with_local_variables_contain_no_secret(
    kind: type[KalmClient], failure: str, ours: bool
) -> None:
    step = FAILURES[failure]
    with FaultyServer([step] * 9, ours=ours) as server:
        url = server.url if step else "http://127.0.0.1:1"
        client = client_of(kind, url, timeout=1, max_retries=1)
        with pytest.raises(KalmError) as caught:
            _query(client)
        error = caught.value
        assert_clean(str(error), repr(error), vars(error), pickle.dumps(error))
        shown = traceback.TracebackException.from_exception(error, capture_locals=True)
        assert_clean("".join(shown.format()))
        client.close()


def test_an_error_of_a_proxy_does_not_contain_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 407 no\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        monkeypatch.setenv("https_proxy", f"http://user:hunter2@127.0.0.1:{port}")
        monkeypatch.delenv("no_proxy", raising=False)
        async with client_of(KalmClient, "https://kalm.invalid", max_retries=0) as client:
            with pytest.raises(KalmError, match="407") as caught:
                await client.aembed(["x"])
        server.close()
        error = caught.value
        assert_clean(str(error), repr(error), repr(error.__cause__))
        shown = traceback.TracebackException.from_exception(error)
        assert_clean(*shown.format())

    asyncio.run(main())


def test_an_error_about_arguments_contains_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"batch_size": 0}, {"modal_key": ""}, {"api_key": "hunter2\x00"}, {"x": 1}):
        for name, secret in SECRETS.items():
            monkeypatch.setenv(f"KALM_{name.upper()}", secret)
        with pytest.raises(ConfigurationError) as caught:
            KalmClient(**{"base_url": "http://there", **wrong})  # type: ignore[arg-type]
        # This test's own frame, which holds them, is left out.
        trace = caught.value.__traceback__
        assert trace is not None
        inside = caught.value.with_traceback(trace.tb_next)
        shown = traceback.TracebackException.from_exception(inside, capture_locals=True)
        assert_clean(str(caught.value), *shown.format())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__module__)
def test_a_copy_with_another_key_shows_neither_key(kind: type[KalmClient]) -> None:
    client = client_of(kind)
    with pytest.raises(AttributeError) as caught:
        client.api_key = "hunter2-new"  # type: ignore[assignment,misc]
    copied = client.with_options(api_key="hunter2-new")
    assert config_of(copied).api_key is not None
    assert config_of(copied).api_key.get_secret_value() == "hunter2-new"
    assert_clean(caught.value, repr(copied), config_of(copied).model_dump())


ECHOES: dict[str, Step] = {
    "refusal": reply(401, '{"error": {"message": "wrong key hunter2-a", "code": "hunter2-a"}}'),
    "plain text": reply(500, "hunter2-a"),
    "page": reply(200, "<html>hunter2-a", "text/html"),
    "reason": reply(
        400, '{"error": {"message": "m", "invalid": [{"index": 0, "reason": "hunter2-a"}]}}'
    ),
    "request id": reply(200, **{ECHO_HEADER: "hunter2-a"}),
    "time of a retry": reply(503, **{"Retry-After": "hunter2-a"}),
    "JSON": reply(200, '{"error": "hunter2-a"}'),
    "vector": reply(200, '{"data": [{"embedding": "hunter2-a"}]}'),
    "index": reply(200, '{"data": [{"embedding": [1.0], "index": "hunter2-a"}]}'),
    "model": reply(200, '{"model": "hunter2-a", "data": [{"embedding": [1.0]}]}'),
    "media type": reply(200, "x", "hunter2-a"),
    "encoding": reply(200, "x", **{"Content-Encoding": "hunter2-a"}),
    "packed": reply(200, "hunter2-a", MEDIA_TYPE),
    "another server": reply(302, Location="http://elsewhere/hunter2-a"),
    "no URL": reply(302, Location="http://[hunter2-a"),
    "moved": reply(302, Location="/hunter2-a"),
    "redirect": reply(307, Location="/v1/embeddings?hunter2-a"),
}


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("method", ["embed", "count_tokens"])
@pytest.mark.parametrize("echo", ECHOES)
def test_a_key_that_a_server_sends_back_is_not_shown(echo: str, method: str, ours: bool) -> None:
    with FaultyServer([ECHOES[echo]] * 9, ours=ours) as server:
        with client_of(KalmClient, server.url, timeout=5, max_retries=1) as client:
            with pytest.raises(KalmError) as caught:
                getattr(client, method)(["x"])
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    # The server's own steps are among this test's locals.
    frames = [line for line in shown.format() if "test_secrets.py" not in line]
    assert_clean(str(caught.value), repr(caught.value), *frames)


@pytest.mark.parametrize("url", ["http://bob:hunter2@there", "http://there?key=hunter2"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__module__)
def test_no_local_variable_shows_the_credential_in_a_refused_base_url(
    kind: type[KalmClient], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid = kind(base_url="http://there")
    monkeypatch.setenv("KALM_BASE_URL", url)
    for construct in (
        lambda: kind(base_url=url),
        kind,
        lambda: valid.with_options(base_url=url),
        lambda: valid.with_options(api_key="hunter2", batch_size=0),
    ):
        with pytest.raises(ConfigurationError) as caught:
            construct()
        trace = caught.value.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        inside = caught.value.with_traceback(trace)
        shown = traceback.TracebackException.from_exception(inside, capture_locals=True)
        assert_clean(*shown.format())


@pytest.mark.parametrize("backend", ["auto", "http"])
def test_a_base_url_with_a_credential_is_rejected_without_showing_it(backend: str) -> None:
    with pytest.raises(ConfigurationError, match="base_url holds a credential") as caught:
        KalmClient(backend=backend, base_url="http://bob:hunter2@there")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="base_url is not like") as asked:
        KalmClient(backend=backend, base_url="http://there?key=hunter2")  # type: ignore[arg-type]
    assert_clean(caught.value, asked.value)


def _query(client: Any) -> None:
    if isinstance(client, KalmModalEmbeddings):
        client.embed_query("q")
    elif isinstance(client, ours_for_llama_index.KalmModalEmbeddings):
        client.get_query_embedding("q")
    else:
        client.embed(["q"], role="query")
