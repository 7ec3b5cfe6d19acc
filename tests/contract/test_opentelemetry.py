"""Spans of client and service: with the SDK's in-memory exporter, and as an OTLP receiver gets them
from `kalm serve`."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from pydantic import SecretStr
from scripted_engine import ScriptedEngine
from serving import FaultyServer, packed, ready_url, reply, serving

from kalm_integrations import KalmClient, errors
from kalm_integrations.models import EMBEDDED
from kalm_integrations.protocol import EmbedRequest
from kalm_integrations.transports import modal as modal_transport
from kalm_integrations.transports.in_process import InProcessTransport
from modal_backend import rpc
from modal_backend.engines.base import Progress
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.service import EmbeddingService

MODEL = EMBEDDED.space.model
SECRETS = {"text": "secret text", "key": "secret-key"}
TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "monitoring.md").read_text()


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Gets what a provider of this test records."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return exporter


class ReportingEngine(ScriptedEngine):
    """Reports its progress."""

    async def embed(self, texts: Sequence[str], *, progress: Progress, **options: Any) -> Any:
        progress(0)
        output = await super().embed(texts, **options)
        progress(len(texts))
        return output


@pytest.fixture
def service() -> EmbeddingService:
    return EmbeddingService(ReportingEngine())


@pytest.fixture
def url(service: EmbeddingService) -> Iterator[str]:
    with serving(create_app(service, keys=BearerKeys([SecretStr(SECRETS["key"])]))) as url:
        yield url


def client_of(url: str, **options: Any) -> KalmClient:
    return KalmClient(base_url=url, api_key=SECRETS["key"], model=MODEL, **options)


def split(spans: tuple[ReadableSpan, ...]) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """The client's span and the server's; they are documented and contain nothing secret."""
    for span in spans:
        names = {
            *(span.attributes or {}),
            *(name for e in span.events for name in e.attributes or {}),
        }
        assert {name for name in names if f"`{name}`" not in PAGE} == set()
        assert [value for value in SECRETS.values() if value in span.to_json()] == []
    (client,) = (span for span in spans if span.kind is SpanKind.CLIENT)
    return client, [span for span in spans if span.kind is SpanKind.SERVER]


class TestOverHttp:
    def test_a_call_is_one_trace(self, exporter: InMemorySpanExporter, url: str) -> None:
        texts = [f"{SECRETS['text']} {number}" for number in range(5)]
        with trace.get_tracer("app").start_as_current_span("app") as parent:
            client_of(url, batch_size=2).embed(texts)
        client, servers = split(
            tuple(span for span in exporter.get_finished_spans() if span.name != "app")
        )
        assert client.name == f"embeddings {MODEL}"
        assert client.parent is not None
        assert client.parent.span_id == parent.get_span_context().span_id
        port = int(url.rpartition(":")[2])
        assert dict(client.attributes or {}) == {
            "gen_ai.operation.name": "embeddings",
            "gen_ai.provider.name": "kalm",
            "gen_ai.request.model": MODEL,
            "gen_ai.embeddings.dimension.count": 512,
            "gen_ai.usage.input_tokens": 5,
            "server.address": "127.0.0.1",
            "server.port": port,
            "kalm.backend": "http",
            "kalm.role": "document",
            "kalm.texts": 5,
            "kalm.requests": 3,
        }
        assert len(servers) == 3
        for server in servers:
            assert server.parent is not None
            assert server.parent.is_remote
            assert server.parent.span_id == client.get_span_context().span_id
            assert server.get_span_context().trace_id == client.get_span_context().trace_id
            attributes = server.attributes or {}
            assert attributes["kalm.identity"] == ScriptedEngine.identity.fingerprint
            assert 0 <= attributes["kalm.queue.seconds"] < 10  # type: ignore[operator]
            assert 0 <= attributes["kalm.engine.seconds"] < 10  # type: ignore[operator]
        assert sum(s.attributes["kalm.texts"] for s in servers) == 5  # type: ignore[index, misc]

    def test_several_servers(self, exporter: InMemorySpanExporter, url: str) -> None:
        with client_of(f"{url},{url}/v1") as client:
            client.embed(["a"])
        call, _ = split(exporter.get_finished_spans())
        assert "server.address" not in (call.attributes or {})

    @pytest.mark.usefixtures("quick_retries")
    def test_retries_are_events(self, exporter: InMemorySpanExporter) -> None:
        steps = [reply(500), reply(429), packed()]
        with FaultyServer(steps=steps) as server:
            client_of(server.url).embed([SECRETS["text"]])
            (posted, *_) = server.posted
        client, _ = split(exporter.get_finished_spans())
        kinds = [(event.attributes or {})["error.type"] for event in client.events]
        assert [event.name for event in client.events] == ["retry", "retry"]
        assert kinds == [errors.ServiceUnavailableError.code, errors.RateLimitError.code]
        assert client.status.status_code is StatusCode.UNSET
        context = client.get_span_context()
        sent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        assert posted.headers["traceparent"] == sent

    def test_an_error_is_its_code_without_its_message(
        self, exporter: InMemorySpanExporter, url: str, service: EmbeddingService
    ) -> None:
        service.engine = ScriptedEngine(lambda vectors: vectors[:-1])
        with pytest.raises(errors.InvalidResponseError):
            client_of(url, max_retries=0).embed([SECRETS["text"]])
        client, (server,) = split(exporter.get_finished_spans())
        for span in (client, server):
            assert (span.attributes or {})["error.type"] == errors.InvalidResponseError.code
            assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, None)
            assert span.events == ()

    async def test_async_calls_have_spans_of_their_own(
        self, exporter: InMemorySpanExporter, url: str
    ) -> None:
        client = client_of(url)
        await asyncio.gather(client.aembed(["a"]), client.aembed(["b"], role="query"))
        clients = [s for s in exporter.get_finished_spans() if s.kind is SpanKind.CLIENT]
        servers = [s for s in exporter.get_finished_spans() if s.kind is SpanKind.SERVER]
        parents = {s.get_span_context().span_id: (s.attributes or {})["kalm.role"] for s in clients}
        assert sorted(parents.values()) == ["document", "query"]
        for span in servers:
            assert span.parent is not None
            assert parents[span.parent.span_id] == (span.attributes or {})["kalm.role"]

    def test_a_stream_that_is_abandoned_ends_its_span(
        self, exporter: InMemorySpanExporter, url: str
    ) -> None:
        stream = client_of(url, batch_size=1).iter_embed(["a", "b", "c"])
        next(stream)
        assert not trace.get_current_span().get_span_context().is_valid
        stream.close()
        (client,) = (s for s in exporter.get_finished_spans() if s.kind is SpanKind.CLIENT)
        assert client.status.status_code is StatusCode.UNSET

    def test_an_unauthorized_request_has_no_span(
        self, exporter: InMemorySpanExporter, url: str
    ) -> None:
        with pytest.raises(errors.AuthenticationError):
            KalmClient(base_url=url, api_key="wrong", model=MODEL).embed(["a"])
        assert split(exporter.get_finished_spans())[1] == []


class TestOverRpc:
    async def test_the_trace_context_is_in_the_message(
        self,
        exporter: InMemorySpanExporter,
        service: EmbeddingService,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        async def call(_: object, method: str, fields: dict[str, Any]) -> dict[str, Any]:
            assert method == "embed_packed"
            with trace.use_span(trace.INVALID_SPAN):  # a container shares no context
                return await rpc.embed_packed(service, fields)

        monkeypatch.setattr(modal_transport.ModalTransport, "_call", call)
        await KalmClient(backend="modal", model=MODEL).aembed([SECRETS["text"]])
        client, (server,) = split(exporter.get_finished_spans())
        assert server.parent is not None
        assert server.parent.is_remote
        assert server.parent.span_id == client.get_span_context().span_id

    @pytest.mark.parametrize("context", [{}, {"traceparent": "nonsense"}, {"other": "x"}])
    async def test_an_invalid_context_starts_a_new_trace(
        self, exporter: InMemorySpanExporter, service: EmbeddingService, context: dict[str, str]
    ) -> None:
        request = EmbedRequest(texts=["a"], role="query", trace_context=context)
        assert "packed" in await rpc.embed_packed(service, asdict(request))
        (server,) = exporter.get_finished_spans()
        assert server.parent is None


def test_in_process(exporter: InMemorySpanExporter, service: EmbeddingService) -> None:
    transport = InProcessTransport(service)
    KalmClient(transport=transport, model=MODEL).embed([SECRETS["text"]])
    client, (server,) = split(exporter.get_finished_spans())
    assert server.parent == client.get_span_context()


@pytest.mark.slow
def test_without_a_provider_nothing_is_imported_or_sent() -> None:
    code = (
        "import sys\n"
        "from kalm_integrations import KalmClient\n"
        "from scripted import ScriptedTransport\n"
        f"client = KalmClient(transport=ScriptedTransport(), model={MODEL!r})\n"
        "client.embed(['x'])\n"
        "from kalm_integrations import tracing\n"
        "assert tracing.trace_context() == {} and tracing.current_span() is None\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)\n"
        "import opentelemetry.trace\n"
        "client.embed(['x'])\n"
        "assert tracing.trace_context() == {} and tracing.current_span() is None\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(TESTS)})


class Receiver(ThreadingHTTPServer):
    """An OTLP/HTTP receiver of traces."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Any] = []
        self.arrived = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Receiver)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.send_response(200)
        self.end_headers()
        if self.path == "/v1/traces":
            message = ExportTraceServiceRequest.FromString(body)
            self.server.spans += [
                span
                for resource in message.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            ]
            self.server.arrived.set()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        thread = threading.Thread(target=receiver.serve_forever)
        thread.start()
        yield receiver
        receiver.shutdown()
        thread.join()


@pytest.mark.slow
def test_kalm_serve_exports_to_an_otlp_receiver(
    exporter: InMemorySpanExporter, receiver: Receiver
) -> None:
    (command,) = re.findall(r"^(opentelemetry-instrument kalm serve)$", PAGE, re.MULTILINE)
    bin_folder = Path(sys.executable).parent
    settings = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.server_port}",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_SERVICE_NAME": "kalm",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "KALM_API_KEY": SECRETS["key"],
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
    }
    server = subprocess.Popen(
        [*command.split(), "--port", "0"],
        env=os.environ | settings,
        stderr=subprocess.PIPE,
        text=True,
    )
    with server:
        url = ready_url(server)
        client_of(url).embed([SECRETS["text"]], role="query")
        server.terminate()  # what is not exported yet is exported at the end
    assert receiver.arrived.wait(30)
    (client,) = exporter.get_finished_spans()
    (span,) = receiver.spans
    context = client.get_span_context()
    assert span.trace_id == context.trace_id.to_bytes(16, "big")
    assert span.parent_span_id == context.span_id.to_bytes(8, "big")
    attributes = {each.key: each.value for each in span.attributes}
    assert attributes["gen_ai.request.model"].string_value == MODEL
    assert attributes["kalm.texts"].int_value == 1
    assert attributes["kalm.engine.seconds"].double_value > 0
