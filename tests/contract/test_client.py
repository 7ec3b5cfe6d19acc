"""What `KalmClient` promises, over a transport that misbehaves on demand.

Each promise is checked through all four ways in: they differ in how they wait, and in nothing
else.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import (
    DIMENSIONS,
    Fault,
    ScriptedTransport,
    poisoned,
    request_id,
    vector_of,
    vectors_of,
)

from kalm_integrations import KalmClient, KalmError
from kalm_integrations.errors import (
    ConfigurationError,
    DeadlineExceededError,
    IdentityMismatchError,
    InputTooLongError,
    InvalidInputError,
    InvalidResponseError,
    InvalidText,
    RequestTooLargeError,
    ServiceUnavailableError,
    TransportError,
)
from kalm_integrations.models import EMBEDDED
from kalm_integrations.protocol import EmbedRequest, ServiceDescription, ServiceWarning
from kalm_integrations.result import EmbeddedBatch, Usage

Over = Callable[..., KalmClient]
Way = Callable[..., np.ndarray[Any, Any]]


def _embed(client: KalmClient, texts: Iterable[str], **options: Any) -> np.ndarray[Any, Any]:
    return client.embed(texts, **options).vectors


def _aembed(client: KalmClient, texts: Iterable[str], **options: Any) -> np.ndarray[Any, Any]:
    return asyncio.run(client.aembed(texts, **options)).vectors


def _placed(parts: Iterable[EmbeddedBatch]) -> np.ndarray[Any, Any]:
    placed = {index: vector for part in parts for index, vector in part}
    rows = [placed[index] for index in range(len(placed))]
    return np.array(rows, dtype=np.float32).reshape(len(rows), DIMENSIONS)


def _iter(client: KalmClient, texts: Iterable[str], **options: Any) -> np.ndarray[Any, Any]:
    return _placed(client.iter_embed(texts, **options))


def _aiter(client: KalmClient, texts: Iterable[str], **options: Any) -> np.ndarray[Any, Any]:
    async def parts() -> list[EmbeddedBatch]:
        return [part async for part in client.aiter_embed(texts, **options)]

    return _placed(asyncio.run(parts()))


every_way = pytest.mark.parametrize("way", [_embed, _aembed, _iter, _aiter])
whole_calls = pytest.mark.parametrize("way", [_embed, _aembed])
TEXTS = [f"text {i}" for i in range(10)]


def delay_of_slow(request: EmbedRequest) -> float:
    return 30.0 if "slow" in request.texts else 0.0


class TestOrder:
    @every_way
    def test_each_text_gets_its_vector_in_any_order_of_responses(
        self, over: Over, way: Way
    ) -> None:
        slow_first = ScriptedTransport(delay=lambda r: 0.05 if "text 0" in r.texts else 0.0)
        client = over(slow_first, batch_size=2)
        assert np.array_equal(way(client, TEXTS), vectors_of(TEXTS))

    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(
        texts=st.lists(st.sampled_from([f"t{i}" for i in range(12)]), max_size=40),
        batch_size=st.integers(1, 7),
        max_concurrency=st.integers(1, 5),
        seed=st.integers(0, 1000),
    )
    def test_property(
        self, over: Over, texts: list[str], batch_size: int, max_concurrency: int, seed: int
    ) -> None:
        moments = random.Random(seed)
        transport = ScriptedTransport(delay=lambda _: moments.choice([0, 0, 0.001, 0.003]))
        client = over(transport, batch_size=batch_size, max_concurrency=max_concurrency)
        for way in (_embed, _aembed, _iter, _aiter):
            assert np.array_equal(way(client, texts), vectors_of(texts))
        assert transport.most_in_flight <= max_concurrency

    def test_the_iterator_yields_in_order_of_responses(self, over: Over) -> None:
        slow_first = ScriptedTransport(delay=lambda r: 0.2 if "text 0" in r.texts else 0.0)
        parts = list(over(slow_first, batch_size=5).iter_embed(TEXTS))
        assert [part.indices.tolist() for part in parts] == [[5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]


class TestPlanning:
    @every_way
    def test_identical_texts_are_embedded_once(self, over: Over, way: Way) -> None:
        transport = ScriptedTransport()
        texts = ["a", "b", "a", "c", "b", "a"]
        assert np.array_equal(way(over(transport, batch_size=2), texts), vectors_of(texts))
        assert transport.sent == ["a", "b", "c"]

    def test_the_role_chooses_the_instruction(self, over: Over) -> None:
        transport = ScriptedTransport()
        client = over(transport, query_instruction="web_search", document_instruction="D: {text}")
        client.embed(["x\n"], role="query")
        client.embed(["x\n"])
        task = "Given a web search query, retrieve relevant passages that answer the query"
        assert transport.sent == [f"Instruct: {task}\nQuery:x\n", "D: x\n"]
        assert [request.role for request in transport.requests] == ["query", "document"]

    @every_way
    def test_an_unknown_role_is_refused(self, over: Over, way: Way) -> None:
        transport = ScriptedTransport()
        with pytest.raises(ConfigurationError, match=r"role='passage': must be one of \('query', "):
            way(over(transport), [""], role="passage")
        with pytest.raises(ConfigurationError, match="on_error='ignore'"):
            over(transport).iter_embed(["a", ""], on_error="ignore")  # type: ignore[arg-type]
        assert transport.requests == []

    @every_way
    def test_no_texts_need_no_service(self, over: Over, way: Way) -> None:
        transport = ScriptedTransport([AssertionError("nothing should be sent")])
        assert way(over(transport), []).shape == (0, DIMENSIONS)
        assert transport.requests == []

    @pytest.mark.slow
    def test_a_hundred_thousand_texts(self, over: Over) -> None:
        transport = ScriptedTransport()
        texts = [f"text {i}" for i in range(100_000)]
        result = over(transport, batch_size=512).embed(texts)
        for index in (0, 511, 512, 50_000, 99_999):
            assert np.array_equal(result.packed[index], vector_of(texts[index]))
        assert result.usage == Usage(tokens=100_000, requests=196)

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_vectors_are_float32_with_any_vector_dtype(self, over: Over, dtype: str) -> None:
        result = over(ScriptedTransport(), vector_dtype=dtype).embed(["a"])
        assert result.packed.dtype == dtype
        assert result.vectors.dtype == np.float32
        assert result.to_lists() == result.vectors.tolist()
        assert np.array_equal(result.vectors, vectors_of(["a"], dtype))


class TestSplitting:
    @every_way
    def test_a_request_that_is_too_large_is_split(self, over: Over, way: Way) -> None:
        def at_most_three(request: EmbedRequest) -> None:
            if len(request.texts) > 3:
                raise RequestTooLargeError("too large")

        transport = ScriptedTransport(refuse=at_most_three)
        assert np.array_equal(way(over(transport), TEXTS), vectors_of(TEXTS))
        assert sorted(len(r.texts) for r in transport.requests) == [2, 2, 3, 3, 5, 5, 10]

    def test_one_text_that_is_too_large_is_named(self, over: Over) -> None:
        def no_seven(request: EmbedRequest) -> None:
            if "text 7" in request.texts:
                raise RequestTooLargeError("too large")

        client = over(ScriptedTransport(refuse=no_seven))
        with pytest.raises(InvalidInputError, match=r"texts\[7\] is too large") as caught:
            client.embed(TEXTS)
        assert [bad.index for bad in caught.value.invalid] == [7]
        rest = list(client.iter_embed(TEXTS, on_error="skip"))
        assert sorted(i for part in rest for i, _ in part) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
        assert [bad.index for part in rest for bad in part.rejected] == [7]


def wrong_count(answer: Any) -> Any:
    return replace(answer, vectors=answer.vectors[:-1])


def one_too_many(answer: Any) -> Any:
    return replace(answer, vectors=np.vstack([answer.vectors, answer.vectors[:1]]))


def other_dimensions(answer: Any) -> Any:
    return replace(answer, vectors=answer.vectors[:, :256])


def other_dtype(answer: Any) -> Any:
    return replace(answer, vectors=answer.vectors.astype(np.float64))


def zeroed(answer: Any) -> Any:
    return replace(answer, vectors=answer.vectors * 0)


def unnormalized(answer: Any) -> Any:
    return replace(answer, vectors=answer.vectors * 1.5)


def other_space(answer: Any) -> Any:
    return replace(answer, identity=replace(EMBEDDED.space, revision="another"))


def anonymous(answer: Any) -> Any:
    return replace(answer, identity=None)


class TestChecks:
    @every_way
    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (wrong_count, r"requested 5 .* got .* shape \(4, 512\)"),
            (one_too_many, r"requested 5 .* got .* shape \(6, 512\)"),
            (other_dimensions, r"512 dimensions, got .* shape \(5, 256\)"),
            (other_dtype, "requested 5 float16 .* got float64"),
            (poisoned(np.nan, row=2), r"texts\[7\] got values that are not finite"),
            (poisoned(np.inf, row=2), r"texts\[7\] got values that are not finite"),
            (zeroed, r"texts\[5\] got a vector of length 0\.0000"),
            (unnormalized, r"texts\[5\] got a vector of length 1\.5"),
        ],
    )
    def test_a_wrong_answer_raises_and_is_not_retried(
        self, over: Over, way: Way, fault: Fault, message: str
    ) -> None:
        transport = ScriptedTransport([None, fault])
        with pytest.raises(InvalidResponseError, match=message):
            way(over(transport, batch_size=5), TEXTS)
        assert len(transport.requests) == 2

    @every_way
    @pytest.mark.parametrize("fault", [other_space, anonymous])
    def test_a_changed_identity_raises_during_a_call(
        self, over: Over, way: Way, fault: Fault
    ) -> None:
        with pytest.raises(IdentityMismatchError, match=r"identity|revision: .*'another'"):
            way(over(ScriptedTransport([None, fault]), batch_size=5), TEXTS)

    def test_the_expected_identity_can_be_declared(self, over: Over) -> None:
        other = replace(EMBEDDED.space, revision="another")
        client = over(ScriptedTransport(space=other), expected_identity=other)
        assert client.embed(["a"]).identity.space == other
        assert client.warm_up().space == other

    def test_warm_up_checks_the_identity(self, over: Over, quick_retries: None) -> None:
        with pytest.raises(IdentityMismatchError):
            over(ScriptedTransport(space=replace(EMBEDDED.space, profile=2))).warm_up()
        waking = ScriptedTransport([ServiceUnavailableError("starting")])
        assert asyncio.run(over(waking).awarm_up()).space == EMBEDDED.space


class TestFailures:
    @whole_calls
    def test_partial_has_the_finished_vectors(self, over: Over, way: Way) -> None:
        late = ScriptedTransport(
            [None, ValueError("boom"), None], delay=lambda r: 0.05 if "text 3" in r.texts else 0.0
        )
        with pytest.raises(TransportError, match="ValueError: boom") as caught:
            way(over(late, batch_size=3, max_concurrency=2), TEXTS)
        partial = caught.value.partial
        assert partial is not None
        assert {0, 1, 2} <= set(partial.indices.tolist())
        assert 3 not in partial.indices
        assert sorted([*partial.indices, *partial.missing]) == list(range(10))
        assert np.array_equal(partial.vectors, vectors_of([TEXTS[i] for i in partial.indices]))

    async def test_calls_that_fail_together_have_their_own_vectors(self, over: Over) -> None:
        """Requests that wait for one probe of the server fail with the same error."""
        shared = ConfigurationError("no such server.")

        def refuse(request: EmbedRequest) -> None:
            if request.texts[0].endswith("last"):
                raise shared

        client = over(ScriptedTransport(refuse=refuse), batch_size=1, max_concurrency=1)
        texts = [["a", "a last"], ["b", "b last"]]
        calls = await asyncio.gather(*map(client.aembed, texts), return_exceptions=True)
        for mine, error in zip(texts, calls, strict=True):
            assert isinstance(error, ConfigurationError)
            assert error.partial is not None
            assert error.partial.indices.tolist() == [0]
            assert np.array_equal(error.partial.vectors, vectors_of(mine[:1]))

    @every_way
    def test_whatever_a_transport_raises_becomes_one_of_our_errors(
        self, over: Over, way: Way
    ) -> None:
        with pytest.raises(KalmError) as caught:
            way(over(ScriptedTransport([KeyError("secret internals")])), TEXTS)
        assert isinstance(caught.value.__cause__, KeyError)

    def test_the_iterator_yields_what_finished_before_it_raises(self, over: Over) -> None:
        transport = ScriptedTransport([None, None, TransportError("boom")])
        parts, seen = over(transport, batch_size=3, max_concurrency=1).iter_embed(TEXTS), []
        with pytest.raises(TransportError):
            for part in parts:
                seen += part.indices.tolist()
        assert seen == [0, 1, 2, 3, 4, 5]

    @whole_calls
    def test_texts_that_the_service_refuses_are_named_and_others_are_kept(
        self, over: Over, way: Way
    ) -> None:
        def refuse(request: EmbedRequest) -> None:
            bad = [i for i, text in enumerate(request.texts) if text in ("text 4", "text 5")]
            if bad:
                raise InputTooLongError.of([InvalidText(i, "is too long") for i in bad])

        transport = ScriptedTransport(
            refuse=refuse, delay=lambda r: 0.1 if "text 4" in r.texts else 0.2
        )
        texts = [*TEXTS, "text 4"]
        with pytest.raises(InputTooLongError) as caught:
            way(over(transport, batch_size=3), texts)
        assert [bad.index for bad in caught.value.invalid] == [4, 5, 10]
        assert caught.value.partial is not None
        assert caught.value.partial.indices.tolist() == [0, 1, 2, 6, 7, 8, 9]
        assert transport.cancelled == 0

    def test_a_refusal_that_names_no_text_ends_the_call(self, over: Over) -> None:
        for fault, raised in (
            (InvalidInputError("no"), InvalidInputError),
            (InvalidInputError.of([InvalidText(99, "no")]), TransportError),
        ):
            with pytest.raises(raised, match="no"):
                list(over(ScriptedTransport([fault])).iter_embed(["a"], on_error="skip"))


@pytest.mark.usefixtures("quick_retries")
class TestRetries:
    @every_way
    def test_temporary_failures_are_retried(self, over: Over, way: Way) -> None:
        faults: list[Fault] = [ServiceUnavailableError("busy")] * 3
        transport = ScriptedTransport(faults)
        assert np.array_equal(way(over(transport), TEXTS), vectors_of(TEXTS))
        assert len(transport.requests) == 4

    @whole_calls
    def test_at_most_max_retries_times(self, over: Over, way: Way) -> None:
        transport = ScriptedTransport(itertools.repeat(ServiceUnavailableError("busy")))
        with pytest.raises(ServiceUnavailableError, match="busy") as caught:
            way(over(transport, max_retries=2), ["a"])
        assert len(transport.requests) == 3
        assert caught.value.retries == 2
        assert "Retries: 2" in str(caught.value)

    def test_retry_after_is_honoured(self, over: Over) -> None:
        transport = ScriptedTransport([ServiceUnavailableError("busy", retry_after=0.2)])
        start = time.monotonic()
        over(transport).embed(["a"])
        assert time.monotonic() - start >= 0.2

    def test_no_wait_exceeds_the_deadline(self, over: Over) -> None:
        transport = ScriptedTransport([ServiceUnavailableError("busy", retry_after=60)])
        with pytest.raises(ServiceUnavailableError) as caught:
            over(transport, timeout=5).embed(["a"])
        assert caught.value.retries == 0

    @whole_calls
    def test_invalid_input_is_not_retried(self, over: Over, way: Way) -> None:
        transport = ScriptedTransport([InvalidInputError.of([InvalidText(0, "is bad")])])
        with pytest.raises(InvalidInputError, match=r"texts\[0\] is bad"):
            way(over(transport), ["a"])
        assert len(transport.requests) == 1


class TestDeadline:
    @whole_calls
    def test_one_total_deadline_for_a_call(self, over: Over, way: Way) -> None:
        stalled = ScriptedTransport(delay=lambda r: 0.0 if "text 0" in r.texts else 120)
        start = time.monotonic()
        with pytest.raises(DeadlineExceededError, match=r"timeout=0\.3 s") as caught:
            way(over(stalled, batch_size=5, timeout=0.3), TEXTS)
        assert time.monotonic() - start < 60
        assert caught.value.partial is not None
        assert caught.value.partial.indices.tolist() == [0, 1, 2, 3, 4]
        assert isinstance(caught.value, TimeoutError)

    def test_a_timeout_quotes_no_failure_of_another_request(self, over: Over) -> None:
        transport = ScriptedTransport([ServiceUnavailableError("busy")], delay=delay_of_slow)
        client = over(transport, timeout=0.2, max_retries=0)
        with pytest.raises(ServiceUnavailableError, match="busy"):
            client.embed(["quick"])
        with pytest.raises(DeadlineExceededError) as caught:
            client.embed(["slow"])
        assert "busy" not in str(caught.value)

    def test_waiting_for_a_slot_counts(self, over: Over) -> None:
        stalled = ScriptedTransport(delay=lambda _: 30)
        with pytest.raises(DeadlineExceededError):
            over(stalled, batch_size=1, max_concurrency=1, timeout=0.2).embed(["a", "b"])
        assert len(stalled.requests) == 1

    def test_the_iterator_has_a_deadline_for_each_request(self, over: Over) -> None:
        transport = ScriptedTransport(delay=lambda _: 0.1)
        client = over(transport, batch_size=1, max_concurrency=1, timeout=0.5)
        assert sum(len(part) for part in client.iter_embed(TEXTS)) == 10  # 1 s in all

    def test_the_service_is_told_how_long_the_caller_waits(self, over: Over) -> None:
        transport = ScriptedTransport()
        over(transport, timeout=7).embed(["a"])
        told = transport.requests[0].timeout
        assert told is not None
        assert 6 < told <= 7


class TestColdStart:
    def test_a_slow_first_response_is_logged_once_as_a_possible_start(
        self, over: Over, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("kalm_integrations.session.COLD_START_HINT", 0.05)
        client = over(ScriptedTransport(delay=lambda _: 0.2), batch_size=1)
        client.embed(TEXTS)
        client.embed(TEXTS)
        assert caplog.text.count("the service may be starting") == 1

    def test_a_service_that_has_responded_is_not_logged_as_starting(
        self, over: Over, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("kalm_integrations.session.COLD_START_HINT", 0.1)
        client = over(ScriptedTransport(delay=lambda r: 0.0 if "quick" in r.texts else 0.3))
        client.embed(["quick"])
        client.embed(["slow"])
        assert "starting" not in caplog.text


class NeverReady(ScriptedTransport):
    """Of a service that starts, and has not started yet."""

    async def ensure_ready(self) -> ServiceDescription:
        await asyncio.sleep(30)
        return await super().ensure_ready()


class TestStillStarting:
    def test_a_timeout_names_the_log_and_warm_up(self, over: Over) -> None:
        client = over(NeverReady(delay=lambda _: 30), timeout=0.1)
        for call in (client.warm_up, lambda: client.embed(["a"])):
            with pytest.raises(DeadlineExceededError) as caught:
                call()
            assert "modal app logs vllm-embedding-snapshot" in str(caught.value)
            assert "warm_up(timeout=1800)" in str(caught.value)

    def test_warm_up_has_its_own_timeout(self, over: Over) -> None:
        client = over(NeverReady(), timeout=600)
        with pytest.raises(DeadlineExceededError, match=r"timeout=0\.1 s"):
            client.warm_up(timeout=0.1)
        with pytest.raises(DeadlineExceededError, match=r"timeout=0\.1 s"):
            asyncio.run(client.awarm_up(timeout=0.1))
        with pytest.raises(ConfigurationError, match="timeout=0"):
            client.warm_up(timeout=0)

    def test_a_timeout_of_a_service_that_has_responded_does_not_mention_a_start(
        self, over: Over
    ) -> None:
        transport = ScriptedTransport(delay=lambda r: 0.0 if "quick" in r.texts else 30)
        client = over(transport, timeout=2)
        client.embed(["quick"])
        with pytest.raises(DeadlineExceededError) as caught:
            client.embed(["slow"])
        assert "starting" not in str(caught.value)

    def test_warnings_of_the_service_are_logged(
        self, over: Over, caplog: pytest.LogCaptureFixture
    ) -> None:
        transport = ScriptedTransport()
        transport.service_warnings = (ServiceWarning("canary_failed", "wrong vectors."),)
        over(transport).warm_up()
        assert "canary_failed: wrong vectors." in caplog.text


def _eventually(condition: Callable[[], bool]) -> bool:
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.01)
    return False


class TestCancellation:
    def test_a_cancelled_task_cancels_its_requests(self, over: Over) -> None:
        transport = ScriptedTransport(delay=lambda _: 30)

        async def main() -> None:
            task = asyncio.create_task(over(transport, batch_size=5).aembed(TEXTS))
            while transport.in_flight < 2:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        assert _eventually(lambda: transport.cancelled == 2)

    def test_an_abandoned_iterator_cancels_its_requests(self, over: Over) -> None:
        transport = ScriptedTransport(delay=lambda r: 0.1 if "text 0" in r.texts else 30)
        parts = over(transport, batch_size=1, max_concurrency=3).iter_embed(TEXTS)
        next(parts)
        # The free slot was taken before the part was handed out.
        assert _eventually(lambda: transport.in_flight == 3)
        parts.close()
        assert _eventually(lambda: transport.in_flight == 0)
        assert transport.cancelled == 3

    def test_a_failure_cancels_the_rest(self, over: Over) -> None:
        transport = ScriptedTransport(
            [TransportError("boom")], delay=lambda r: 0.1 if "text 0" in r.texts else 30
        )
        with pytest.raises(TransportError):
            over(transport, batch_size=1, max_concurrency=3).embed(TEXTS)
        assert _eventually(lambda: transport.in_flight == 0)
        assert (transport.cancelled, len(transport.requests)) == (2, 3)


class TestStreaming:
    def test_an_iterator_is_read_as_needed_on_the_callers_thread(self, over: Over) -> None:
        read: list[int] = []

        def texts() -> Iterator[str]:
            for index in range(100_000):
                assert threading.current_thread() is threading.main_thread()
                read.append(index)
                yield f"text {index}"

        parts = over(ScriptedTransport(), batch_size=64).iter_embed(texts())
        next(parts)
        assert len(read) < 20_000
        parts.close()

    def test_a_list_is_checked_before_anything_is_sent(self, over: Over) -> None:
        transport = ScriptedTransport()
        for start in (KalmClient.iter_embed, KalmClient.aiter_embed):
            with pytest.raises(InvalidInputError, match=r"texts\[10\] is empty"):
                start(over(transport), [*TEXTS, ""])
        assert transport.requests == []

    def test_an_iterator_that_fails_loses_no_finished_vector(self, over: Over) -> None:
        def texts() -> Iterator[str]:
            yield from (f"text {i}" for i in range(8192))
            raise OSError("the file ended in the middle")

        seen = 0
        with pytest.raises(OSError, match="in the middle"):
            for part in over(ScriptedTransport(delay=lambda _: 0.01)).iter_embed(texts()):
                seen += len(part)
        assert seen == 8192

    @every_way
    def test_skip_is_for_the_iterator_only(self, over: Over, way: Way) -> None:
        client = over(ScriptedTransport())
        if way in (_embed, _aembed):
            with pytest.raises(TypeError):
                way(client, ["a", ""], on_error="skip")
        else:
            assert len(way(client, ["a", ""], on_error="skip")) == 1


class TestSlots:
    def test_requests_in_flight_are_bounded_over_all_calls(self, over: Over) -> None:
        transport = ScriptedTransport(delay=lambda _: 0.01)
        client = over(transport, batch_size=1, max_concurrency=3)

        async def main() -> None:
            await asyncio.gather(*(client.aembed([f"{i}-{t}" for t in TEXTS]) for i in range(5)))

        asyncio.run(main())
        assert transport.most_in_flight == 3

    def test_queries_do_not_wait_behind_documents(self, over: Over) -> None:
        transport = ScriptedTransport(delay=lambda r: 0.0 if r.role == "query" else 30)
        client = over(transport, batch_size=1, max_concurrency=2)

        async def main() -> None:
            bulk = asyncio.create_task(client.aembed(TEXTS))
            while transport.in_flight < 2:
                await asyncio.sleep(0.01)
            await asyncio.wait_for(client.aembed(["q"], role="query"), timeout=5)
            bulk.cancel()

        asyncio.run(main())


class TestCallersSide:
    def test_context_variables_are_those_of_the_call(self, over: Over) -> None:
        transport = ScriptedTransport()
        client = over(transport)

        async def traced(name: str) -> None:
            request_id.set(name)
            await client.aembed([name])

        async def main() -> None:
            await asyncio.gather(traced("a"), traced("b"))

        asyncio.run(main())
        request_id.set("sync")
        client.embed(["c"])
        assert sorted(transport.request_ids) == ["a", "b", "sync"]

    def test_usage_is_reported_on_the_callers_thread_and_its_errors_lose_no_vectors(
        self, over: Over, caplog: pytest.LogCaptureFixture
    ) -> None:
        seen: list[tuple[Usage, threading.Thread]] = []

        def on_usage(usage: Usage) -> None:
            seen.append((usage, threading.current_thread()))
            raise RuntimeError("accounting is down")

        client = over(ScriptedTransport(), batch_size=5, on_usage=on_usage)
        result = client.embed(TEXTS)
        assert len(result) == 10
        assert sum((usage for usage, _ in seen), Usage()) == result.usage == Usage(10, 2)
        assert {thread for _, thread in seen} == {threading.current_thread()}
        assert "accounting is down" in caplog.text

    def test_usage_of_a_failed_call_is_reported_too(self, over: Over) -> None:
        seen: list[Usage] = []
        transport = ScriptedTransport([None, TransportError("boom")])
        client = over(transport, batch_size=5, max_concurrency=1, on_usage=seen.append)
        with pytest.raises(TransportError):
            client.embed(TEXTS)
        assert seen == [Usage(5, 1)]

    @pytest.mark.parametrize("way", [_embed, _aembed])
    def test_progress_moves_with_every_request(
        self, over: Over, way: Way, capsys: pytest.CaptureFixture[str]
    ) -> None:
        steps: list[int] = []
        client = over(ScriptedTransport(), batch_size=4, show_progress=True)
        way(client, TEXTS, on_progress=steps.append)
        assert (sorted(steps), capsys.readouterr().err) == ([2, 4, 4], "")
        way(client, TEXTS)
        assert "10/10" in capsys.readouterr().err
        way(client, TEXTS, role="query")
        assert capsys.readouterr().err == ""


class TestLife:
    def test_a_second_event_loop_finds_the_connections_alive(
        self, over: Over, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = over(ScriptedTransport())
        opened: list[object] = []
        transport = ScriptedTransport()
        monkeypatch.setattr(
            "kalm_integrations.dispatch.open_transport", lambda s: opened.append(s) or transport
        )
        for _ in range(3):
            asyncio.run(client.aembed(TEXTS))
        client.embed(TEXTS)
        assert len(opened) == 1

    async def test_a_blocking_call_inside_a_running_loop_works(self, over: Over) -> None:
        assert len(over(ScriptedTransport()).embed(TEXTS)) == 10

    def test_many_threads_share_one_client(self, over: Over) -> None:
        client = over(ScriptedTransport(delay=lambda _: random.random() / 500), batch_size=2)
        wrong: list[int] = []

        def work(worker: int) -> None:
            texts = [f"{worker}: {text}" for text in TEXTS]
            for _ in range(10):
                if not np.array_equal(client.embed(texts).vectors, vectors_of(texts)):
                    wrong.append(worker)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_a_closed_client_opens_new_connections(self, over: Over) -> None:
        transport = ScriptedTransport()
        with over(transport) as client:
            client.embed(["a"])
        assert transport.closed == 1
        assert len(client.embed(["b"])) == 1

        async def main() -> None:
            async with client:
                await client.aembed(["c"])

        asyncio.run(main())
        assert transport.closed == 2
        client.close()
        client.close()

    def test_a_changed_copy_has_its_own_connections(self, over: Over) -> None:
        transport = ScriptedTransport()
        client = over(transport)
        client.embed(["a"])
        client.with_options(truncate="end").embed(["b"])
        assert [request.truncate for request in transport.requests] == ["error", "end"]
