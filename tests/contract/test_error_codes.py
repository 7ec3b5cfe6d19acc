"""What the service answers with is the same error for the caller, whichever way it came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scripted import ScriptedTransport, vectors_of
from scripted_engine import ScriptedEngine
from serving import FaultyServer, serving

from kalm_integrations import KalmClient, errors
from kalm_integrations.errors import CLIENT_ONLY, InvalidText, KalmError, subclasses
from kalm_integrations.models import EMBEDDED
from modal_backend import rpc
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.service import EmbeddingService

pytestmark = pytest.mark.usefixtures("quick_retries")
SENT = [kind for kind in subclasses(KalmError) if kind not in CLIENT_ONLY]


def app_of(engine: ScriptedEngine) -> Any:
    return create_app(EmbeddingService(engine), keys=BearerKeys(None))


def example(kind: type[KalmError]) -> KalmError:
    if issubclass(kind, errors.InvalidInputError | errors.InvalidResponseError):
        return kind.of([InvalidText(1, "is odd")])
    return kind("It happened.")


@pytest.mark.parametrize("kind", SENT)
def test_each_code_is_the_same_class_over_http_and_rpc(kind: type[KalmError]) -> None:
    engine = ScriptedEngine(faults={"embed": example(kind)})
    settings: dict[str, Any] = {"model": EMBEDDED.space.model, "max_retries": 0, "batch_size": 4}
    texts = [f"text {i}" for i in range(4)]
    with serving(app_of(engine)) as url, KalmClient(base_url=url, **settings) as client:
        with pytest.raises(KalmError) as over_http:
            client.embed(texts)
    assert over_http.type is (kind if kind is not errors.RequestTooLargeError else _HALVED)
    if indices := getattr(over_http.value, "invalid", ()):
        assert [bad.index for bad in indices] in ([1], [0])


_HALVED = errors.InvalidInputError  # halved until one text is left, and that is named


async def test_no_advice_for_python_callers_is_sent() -> None:
    for kind in SENT:
        service = EmbeddingService(ScriptedEngine(faults={"embed": example(kind)}))
        reply = await rpc.embed_packed(service, {"texts": ["a"], "role": "query"})
        message = reply["error"]["message"]
        assert message in ("It happened.", "texts[1] is odd.")


class PoisonedEngine(ScriptedEngine):
    """Gives NaN for texts with "bad" in them."""

    def right(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        vectors = super().right(texts)
        vectors[["bad" in text for text in texts]] = np.nan
        return vectors


TEXTS = [f"text {i}" for i in range(12)]
TEXTS[10] = TEXTS[3] = "bad"


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_text_with_an_invalid_vector_is_named_and_can_be_skipped(concurrency: int) -> None:
    with (
        serving(app_of(PoisonedEngine())) as url,
        KalmClient(
            base_url=url, model=EMBEDDED.space.model, batch_size=5, max_concurrency=concurrency
        ) as client,
    ):
        check_named_and_skipped(client)


def check_named_and_skipped(client: KalmClient) -> None:
    with pytest.raises(errors.InvalidResponseError) as caught:
        client.embed(TEXTS)
    assert [bad.index for bad in caught.value.invalid] == [3, 10]

    vectors = np.full((12, 512), np.nan, dtype=np.float32)
    rejected: list[int] = []
    for part in client.iter_embed(TEXTS, on_error="skip"):
        vectors[part.indices] = part.vectors
        rejected += [bad.index for bad in part.rejected]
    assert sorted(rejected) == [3, 10]
    others = [i for i in range(12) if i not in rejected]
    assert np.array_equal(vectors[others], vectors_of([TEXTS[i] for i in others]))


def test_no_text_is_skipped_if_all_vectors_are_invalid() -> None:
    """A corpus must not end as nulls because of it."""
    with (
        serving(app_of(ScriptedEngine(lambda vectors: vectors * np.nan))) as url,
        KalmClient(base_url=url, model=EMBEDDED.space.model, batch_size=5) as client,
    ):
        with pytest.raises(errors.InvalidResponseError):
            list(client.iter_embed(TEXTS, on_error="skip"))


def test_a_vector_that_only_the_client_checks_is_named_and_can_be_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that is not ours, or a transport of the caller's own, checks nothing."""

    def spoil(answer: Any) -> Any:
        bad = [text == "bad" for text in transport.requests[-1].texts]
        answer.vectors[bad] = np.nan
        return answer

    transport = ScriptedTransport([spoil] * 99)
    monkeypatch.setattr("kalm_integrations.dispatch.open_transport", lambda _: transport)
    client = KalmClient(backend="local", batch_size=5, max_concurrency=1)
    check_named_and_skipped(client)


def test_a_code_of_the_client_is_ignored_in_a_response() -> None:
    from test_http_faults import openai_error

    for kind in CLIENT_ONLY:
        with FaultyServer([openai_error(500, "x", kind.code)] * 2) as server:
            client = KalmClient(base_url=server.url, model=EMBEDDED.space.model, max_retries=0)
            with pytest.raises(errors.ServiceUnavailableError):
                client.embed(["a"])
            client.close()


def test_any_number_of_texts_is_skipped_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is not ours may name one text at a time."""

    def refuse(request: Any) -> None:
        for row, text in enumerate(request.texts):
            if text.startswith("bad"):
                raise errors.InvalidInputError.of([InvalidText(row, "is bad")])

    transport = ScriptedTransport(refuse=refuse)
    monkeypatch.setattr("kalm_integrations.dispatch.open_transport", lambda _: transport)
    client = KalmClient(backend="local", batch_size=2048)
    parts = list(client.iter_embed([*(f"bad {i}" for i in range(1200)), "good"], on_error="skip"))
    assert [i for part in parts for i in part.indices] == [1200]
    assert [bad.index for part in parts for bad in part.rejected] == list(range(1200))
