"""The RPC endpoint: requests, errors, limits, and the translation of Modal's exceptions."""

from __future__ import annotations

import asyncio
import pickle
import time
from dataclasses import asdict

import grpclib
import modal.exception as theirs
import numpy as np
import pytest
from grpclib.exceptions import StreamTerminatedError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted import vectors_of
from scripted_engine import ScriptedEngine

from kalm_integrations.batching import plan
from kalm_integrations.codec import pack, unpack
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import (
    CLIENT_ONLY,
    CanaryFailedError,
    ConfigurationError,
    ConnectionFailedError,
    ContainerFailedError,
    DeadlineExceededError,
    InputTooLongError,
    InvalidInputError,
    InvalidResponseError,
    InvalidText,
    KalmError,
    ModalTokenError,
    NotDeployedError,
    PermissionDeniedError,
    RateLimitError,
    RequestTooLargeError,
    ServiceUnavailableError,
    TransportError,
    subclasses,
)
from kalm_integrations.models import EMBEDDED, KALM
from kalm_integrations.protocol import (
    EmbedRequest,
    EmbedResponse,
    ServiceWarning,
    error_fields,
    error_from_fields,
    read_warnings,
)
from kalm_integrations.result import Usage
from kalm_integrations.transports.modal import translated
from modal_backend import rpc
from modal_backend.engines.failed import FailedEngine
from modal_backend.service import EmbeddingService

BUILT_IN = (bool, int, float, str, bytes, type(None))
NEEDS_NOTHING = (b"kalm", b"modal_backend", b"numpy")
REQUESTS = st.builds(
    EmbedRequest,
    texts=st.lists(st.text()),
    role=st.sampled_from(["query", "document"]),
    dimensions=st.none() | st.integers(1),
    truncate=st.sampled_from(["error", "end"]),
    dtype=st.sampled_from(["float16", "float32"]),
    timeout=st.none() | st.floats(allow_nan=False),
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def is_built_in(value):
    if type(value) is dict:
        return all(type(key) is str and is_built_in(inner) for key, inner in value.items())
    return all(map(is_built_in, value)) if type(value) is list else type(value) in BUILT_IN


def service(**engine):
    return EmbeddingService(ScriptedEngine(**engine))


def request_of(**fields):
    return {"texts": ["a", "b"], "role": "document"} | fields


# -- requests ----------------------------------------------------------------------------------
@given(REQUESTS)
def test_a_request_round_trips(request_):
    fields = asdict(request_)
    assert is_built_in(fields)
    pickled = pickle.dumps(fields)
    assert not any(name in pickled for name in NEEDS_NOTHING if name not in repr(fields).encode())
    assert EmbedRequest.from_fields(pickle.loads(pickled)) == request_


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (None, "texts and role"),
        ([], "texts and role"),
        ("texts role", "texts and role"),
        ({}, "texts: "),
        ({"texts": ["a"]}, "role: "),
        (request_of(role="admin"), "role: "),
        (request_of(role=None), "role: "),
        (request_of(role=["query"]), "role: "),
        (request_of(truncate="start"), "truncate: "),
        (request_of(dtype="float64"), "dtype: "),
        (request_of(dtype="object"), "dtype: "),
        (request_of(dimensions=True), "dimensions: "),
        (request_of(timeout="5"), "timeout: "),
        (request_of(priority=9), "priority: "),
        (request_of(**{"__class__": "x"}), "__class__: "),
    ],
)
def test_an_invalid_request_is_refused_with_the_field(fields, message):
    with pytest.raises(ConfigurationError) as caught:
        EmbedRequest.from_fields(fields)
    assert message in str(caught.value)


# -- errors ------------------------------------------------------------------------------------
SENT = [kind for kind in subclasses(KalmError) if kind not in CLIENT_ONLY]


def error(kind):
    if issubclass(kind, InvalidInputError | InvalidResponseError):
        return kind.of([InvalidText(0, "is empty"), InvalidText(1, "is white space only")])
    if issubclass(kind, ServiceUnavailableError):
        return kind("it failed.", 2.5)
    return kind("it failed.")


@pytest.mark.parametrize("kind", SENT)
def test_each_error_round_trips(kind):
    sent = error(kind)
    fields = error_fields(sent)
    assert is_built_in(fields)
    pickled = pickle.dumps(fields)
    assert not any(name in pickled for name in (b"kalm_integrations", b"modal_backend"))
    received = error_from_fields(pickle.loads(pickled))
    assert type(received) is kind
    assert str(received) == str(sent)
    assert received.args == sent.args


@given(
    message=st.text().map(str.strip),
    retry_after=st.none() | st.floats(0, allow_infinity=False),
    invalid=st.lists(st.builds(InvalidText, st.integers(0), st.text(min_size=1)), min_size=1),
)
def test_any_message_and_indices_round_trip(message, retry_after, invalid):
    received = error_from_fields(error_fields(RateLimitError(message, retry_after)))
    assert (received.args, received.retry_after) == ((message,), retry_after)
    refused = error_from_fields(error_fields(InputTooLongError.of(invalid)))
    assert refused.invalid == tuple(invalid)
    assert refused.args == InputTooLongError.of(invalid).args


@pytest.mark.parametrize("kind", CLIENT_ONLY)
def test_client_only_errors_are_not_accepted_from_a_service(kind):
    """A service that reports a mismatch of identities has compared none."""
    received = error_from_fields(error_fields(kind("it failed.")))
    assert type(received) is TransportError
    assert str(received).startswith("it failed.")


@pytest.mark.parametrize("code", [None, "", "teapot", "KalmError", 7, ["rate_limited"], {}])
def test_an_unknown_code_becomes_a_transport_error(code):
    assert (
        type(error_from_fields({"code": code, "message": "of a later version"})) is TransportError
    )


def test_an_empty_error_becomes_a_transport_error():
    assert type(error_from_fields({})) is TransportError


# -- the packed method -------------------------------------------------------------------------
async def test_embed_packed_returns_packed_vectors():
    reply = await rpc.embed_packed(service(), request_of(dtype="float32"))
    assert is_built_in(reply)
    answer = unpack(reply["packed"])
    assert np.array_equal(answer.vectors, vectors_of(["a", "b"], "float32"))
    assert (answer.identity, answer.usage) == (EMBEDDED.space, Usage(2, 1))


async def test_the_deadline_reaches_the_engine():
    served = service()
    await rpc.embed_packed(served, request_of(timeout=60.0))
    (_, how), *_ = served.engine.asked
    assert 0 < how["deadline"] - time.monotonic() < 60


@pytest.mark.parametrize("kind", SENT)
async def test_errors_are_returned_as_data(kind):
    failed = error(kind)
    reply = await rpc.embed_packed(service(faults={"embed": failed}), request_of())
    assert reply == {"error": error_fields(failed)}


async def test_an_unexpected_error_is_returned_as_data_and_logged(caplog):
    reply = await rpc.embed_packed(service(faults={"embed": ZeroDivisionError("0")}), request_of())
    assert type(error_from_fields(reply["error"])) is TransportError
    assert "ZeroDivisionError: 0." in reply["error"]["message"]
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("texts", ["hello", b"hello", {"a": 1}, {"a"}, None, 7])
async def test_texts_that_are_not_a_list_are_refused(texts):
    """The letters of a word have vectors too."""
    served = service()
    reply = await rpc.embed_packed(served, request_of(texts=texts))
    assert reply["error"]["code"] == "invalid_argument"
    with pytest.raises(RuntimeError, match="invalid_argument: texts is"):
        await rpc.embed(served, texts)
    assert not served.engine.asked


async def test_texts_that_cannot_be_embedded_are_named():
    reply = await rpc.embed_packed(service(), request_of(texts=["a", "", None, 3, "\ud800"]))
    assert [bad["index"] for bad in reply["error"]["invalid"]] == [1, 2, 3, 4]


@given(st.dictionaries(st.sampled_from([*asdict(EmbedRequest(texts=[], role="query"))]), JUNK))
async def test_any_request_gets_a_response(fields):
    for sent in (fields, request_of(**fields)):
        reply = await rpc.embed_packed(service(), sent)
        assert reply.keys() in ({"packed"}, {"error"})
        assert is_built_in(reply)
        if "error" in reply:
            assert isinstance(error_from_fields(reply["error"]), KalmError)


async def test_a_cancelled_call_ends():
    class Slow(ScriptedEngine):
        async def embed(self, *_, **__):
            await asyncio.sleep(60)

    calling = asyncio.create_task(rpc.embed_packed(EmbeddingService(Slow()), request_of()))
    await asyncio.sleep(0)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling


# -- the plain methods -------------------------------------------------------------------------
async def test_the_plain_methods_return_lists_of_floats():
    vectors = vectors_of(["a", "b"], "float32").tolist()
    assert await rpc.embed(service(), ["a", "b"]) == vectors
    assert await rpc.embed_with_metadata(service(), ["a", "b"]) == [
        {"text": text, "embedding": vector, "dimension": 512}
        for text, vector in zip(["a", "b"], vectors, strict=True)
    ]
    pickled = pickle.dumps(await rpc.embed_with_metadata(service(), ["a"]))
    assert not any(name in pickled for name in NEEDS_NOTHING)


async def test_no_sentences_return_no_vectors():
    assert await rpc.embed(service(), []) == []


@pytest.mark.parametrize(("sentences", "role"), [(["a"], "query"), (["a", "b"], "document")])
async def test_a_single_sentence_is_a_query(sentences, role):
    served = service()
    await rpc.embed(served, sentences)
    assert [how["role"] for _, how in served.engine.asked] == [role]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (CanaryFailedError("wrong."), f"canary_failed: wrong. {CanaryFailedError.remedy}"),
        (np.exceptions.AxisError("odd"), "unexpected: AxisError: odd."),
    ],
)
async def test_errors_of_plain_methods_need_none_of_our_classes(fault, message):
    with pytest.raises(RuntimeError) as caught:
        await rpc.embed(service(faults={"embed": fault}), ["a"])
    assert type(caught.value) is RuntimeError
    assert str(caught.value).startswith(message)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert not any(name in pickle.dumps(caught.value) for name in NEEDS_NOTHING)


def test_describe_reports_the_service():
    served = service()
    served.warnings = (ServiceWarning("canary_failed", "wrong vectors."),)
    described = rpc.describe(served, {"load": 1.5}, restored=True)
    assert is_built_in(described)
    assert described["identity"] == EMBEDDED.space.to_dict()
    assert (described["dimensions"], described["max_tokens"]) == ([512], 8192)
    assert described["phases"] == {"load": 1.5}
    assert described["restored"] is True
    assert described["warnings"] == [{"code": "canary_failed", "message": "wrong vectors."}]
    assert read_warnings(described) == served.warnings


def test_describe_reports_why_nothing_is_served():
    failure = CanaryFailedError("wrong.")
    described = rpc.describe(EmbeddingService(FailedEngine(failure)), {"load": 1.5})
    assert described["error"] == error_fields(failure)
    assert described.keys() == {
        "version",
        "phases",
        "restored",
        "engine_age",
        "warnings",
        "error",
    }


# -- two megabytes -----------------------------------------------------------------------------
INLINE = 2 * 2**20
LETTERS = ("a", "ü", "语", "😀")


@settings(max_examples=60)
# What fills two megabytes to the last byte, before anything is put around it.
@example("document", 1024, "float32", 2048, [], 600)
@example("document", 64, "float16", 128, [("😀", 262_144, 2)], 0)
@given(
    role=st.sampled_from(["query", "document"]),
    dimensions=st.sampled_from(KALM.dimensions),
    dtype=st.sampled_from(["float16", "float32"]),
    batch_size=st.sampled_from([1, 128, 1000, 2048]),
    lengths=st.lists(
        st.tuples(
            st.sampled_from(LETTERS),
            st.sampled_from([1, 50, 1000, 60_000, 262_144]) | st.integers(1, 262_000),
            st.integers(1, 40),
        ),
        max_size=8,
    ),
    short=st.integers(0, 5000),
)
def test_requests_and_responses_fit_the_inline_limit(
    role, dimensions, dtype, batch_size, lengths, short
):
    client = ClientConfig(
        backend="modal", dimensions=dimensions, vector_dtype=dtype, batch_size=batch_size
    )
    long = [
        (f"{letter}{kind}{copy}" + letter * length)[:262_144]
        for kind, (letter, length, copies) in enumerate(lengths)
        for copy in range(min(copies, 2_000_000 // length + 1))
    ]
    texts = enumerate([*long, *map(str, range(short))])
    sent = 0
    for batch in plan(texts, client.template(role), client.request_limits):
        sent += len(batch)
        fields = asdict(
            EmbedRequest(texts=batch.texts, role=role, dimensions=dimensions, timeout=599.5)
        )
        assert len(pickle.dumps(((fields,), {}))) <= INLINE
        vectors = np.zeros((len(batch), dimensions), dtype=dtype)
        answer = EmbedResponse(vectors=vectors, identity=KALM.space, usage=Usage(1, 1))
        assert len(pickle.dumps({"packed": pack(answer)})) <= INLINE
    assert sent == len(set(long)) + short


# -- Modal's exceptions ------------------------------------------------------------------------
SETTINGS = ClientConfig(backend="modal", app_name="the-app", class_name="TheClass")


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (
            theirs.AuthError("bad token."),
            ModalTokenError,
            "AuthError: bad token. Run `modal setup`",
        ),
        (
            theirs.NotFoundError("no such app"),
            NotDeployedError,
            "Modal app 'the-app', class 'TheClass' is not what this client needs: "
            "NotFoundError: no such app. Run `kalm deploy`",
        ),
        (theirs.PermissionDeniedError("no"), PermissionDeniedError, "Modal forbids it"),
        (theirs.ResourceExhaustedError("many"), RateLimitError, "limit for the workspace"),
        (theirs.FunctionTimeoutError("1s"), DeadlineExceededError, "`kalm deploy --timeout`"),
        (theirs.OutputExpiredError(), DeadlineExceededError, "output: OutputExpiredError. Raise"),
        (theirs.RequestSizeError("2 GB"), RequestTooLargeError, "Modal: RequestSizeError: 2 GB."),
        (theirs.VersionError("old"), ConfigurationError, "upgrade Modal's client (pip install"),
        (theirs.InvalidError("both"), ConfigurationError, "Modal refused the call"),
        (theirs.ConflictError("state"), ConfigurationError, "Modal refused the call"),
        (
            theirs.ServiceError("x"),
            ConnectionFailedError,
            "Modal was not reached: ServiceError: x.",
        ),
        (theirs.InternalError("x"), ConnectionFailedError, "Modal was not reached"),
        (theirs.ConnectionError("x"), ConnectionFailedError, "Modal was not reached"),
        (theirs.TimeoutError("x"), ConnectionFailedError, "Modal was not reached"),
        (theirs.ClientClosed(7), ConnectionFailedError, "the connection to Modal was closed"),
        (StreamTerminatedError("Connection lost"), ConnectionFailedError, "Modal was not reached"),
        (
            theirs.RemoteError("status 137"),
            ContainerFailedError,
            "a container of Modal app 'the-app'",
        ),
        (theirs.InternalFailure("lost"), ContainerFailedError, "InternalFailure: lost. See why"),
        (theirs.ExecutionError("no class"), ContainerFailedError, "`modal app logs APP"),
        # Raised by the container's own code: paid for at every attempt.
        (
            OSError("libcuda.so.1"),
            ContainerFailedError,
            "class 'TheClass' failed: OSError: libcuda",
        ),
        (
            ConnectionRefusedError("hub"),
            ContainerFailedError,
            "failed: ConnectionRefusedError: hub",
        ),
        (TimeoutError("hub"), ContainerFailedError, "failed: TimeoutError: hub."),
        (RuntimeError("cannot load"), ContainerFailedError, "failed: RuntimeError: cannot load."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_exceptions_of_modals_client_are_translated(raised, kind, message):
    async def fails():
        raise raised

    with pytest.raises(KalmError) as caught:
        await translated(fails(), SETTINGS)
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert caught.value.__cause__ is raised


async def test_every_grpc_status_is_translated():
    from modal._grpc_client import grpc_error_to_modal_exception

    for status in set(grpclib.Status) - {grpclib.Status.OK}:

        async def fails(status=status):
            raise grpc_error_to_modal_exception(grpclib.GRPCError(status, "message"))

        with pytest.raises(KalmError, match="message"):
            await translated(fails(), SETTINGS)


async def test_a_configured_environment_is_named():
    async def fails():
        raise theirs.NotFoundError("no")

    dev = ClientConfig(backend="modal", app_name="a", class_name="C", environment_name="dev")
    with pytest.raises(NotDeployedError, match="Modal app 'a' in environment 'dev', class 'C'"):
        await translated(fails(), dev)


async def test_our_errors_and_cancellation_are_not_translated():
    for passing in (ConfigurationError("x"), asyncio.CancelledError()):

        async def fails(passing=passing):
            raise passing

        with pytest.raises(type(passing)) as caught:
            await translated(fails(), SETTINGS)
        assert caught.value is passing
