"""Bulk jobs: every row with its own vector, whatever the rows are; resumed, refused, read back."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_corpora import SMALL, lines, table_of, texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import DIMENSIONS, ScriptedTransport, vector_of, vectors_of

from kalm_integrations import KalmClient
from kalm_integrations.bulk import Options, embed_corpus, estimate, read
from kalm_integrations.bulk.local import Progress
from kalm_integrations.bulk.manifest import Manifest
from kalm_integrations.errors import (
    BadRowsError,
    ConfigurationError,
    IdentityMismatchError,
    InputTooLongError,
    InvalidInputError,
    InvalidResponseError,
    InvalidText,
    ServiceUnavailableError,
)
from kalm_integrations.protocol import EmbedRequest

Over = Callable[..., KalmClient]


def vectors(folder: Path) -> list[Any]:
    column = table_of(folder)["vector"].to_pylist()
    return [None if row is None else np.array(row, dtype=np.float32) for row in column]


def are_of(found: list[Any], expected: list[str | None]) -> bool:
    rows = zip(found, expected, strict=True)
    return all((v is None) if t is None else np.array_equal(v, vector_of(t)) for v, t in rows)


# --- right rows


KINDS = st.one_of(
    st.sampled_from(["a", "b", "c", "again and again"]),
    st.text(min_size=1, max_size=5).filter(lambda t: not t.isspace()),
    st.sampled_from([None, "", "  ", 7, ["x"], {"y": 1}, True]),
)


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.lists(KINDS, min_size=1, max_size=30),
    on_error=st.sampled_from(["skip", "null"]),
    shard_rows=st.integers(1, 9),
    batch_size=st.integers(1, 5),
    refused=st.sets(st.sampled_from(["a", "b"])),
    late=st.sets(st.integers(0, 10)),
)
def test_every_row_has_its_own_vector_or_a_reason(
    tmp_path: Path,
    over: Over,
    rows: list[Any],
    on_error: Any,
    shard_rows: int,
    batch_size: int,
    refused: set[str],
    late: set[int],
) -> None:
    def refuse(request: EmbedRequest) -> None:
        bad = [InvalidText(i, "is refused") for i, t in enumerate(request.texts) if t in refused]
        if bad:
            raise InvalidInputError.of(bad)

    transport = ScriptedTransport(
        refuse=refuse, delay=lambda _: 0.002 if len(transport.requests) in late else 0.0
    )
    client = over(transport, batch_size=batch_size)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    source = texts(tmp_path / "in.jsonl", *rows)
    good = [isinstance(t, str) and bool(t.strip()) and t not in refused for t in rows]
    options = Options(on_error=on_error, shard_rows=shard_rows, id_column="id")
    if not any(isinstance(t, str) and t.strip() for t in rows):
        with pytest.raises(InvalidInputError, match="cannot be embedded"):
            embed_corpus(source, tmp_path / "out", client, options)
        return
    manifest = embed_corpus(source, tmp_path / "out", client, options)
    kept = [n for n, fine in enumerate(good) if fine or on_error == "null"]
    assert manifest.complete
    made = table_of(tmp_path / "out")
    assert made["id"].to_pylist() == [f"n{n}" for n in kept]
    assert are_of(vectors(tmp_path / "out"), [rows[n] if good[n] else None for n in kept])
    bad = [n for n, fine in enumerate(good) if not fine]
    if bad:
        rejected = pq.read_table(tmp_path / "out" / "rejected.parquet")
        assert rejected["row"].to_pylist() == bad
        assert rejected["place"].to_pylist() == [f"in.jsonl line {n + 1}" for n in bad]
        assert all(rejected["reason"].to_pylist())
    answered = [t for t in transport.sent if t not in refused]
    assert (
        len(set(transport.sent))
        >= len(set(answered))
        == sum(1 for _ in {t for t, fine in zip(rows, good, strict=True) if fine})
    )
    assert not list((tmp_path / "out").rglob(".*.tmp"))


def test_a_text_is_sent_once_however_far_apart_its_copies_are(tmp_path: Path, over: Over) -> None:
    transport = ScriptedTransport()
    source = texts(tmp_path / "in.jsonl", *(f"text {n % 7}" for n in range(100)))
    embed_corpus(source, tmp_path / "out", over(transport), SMALL)
    assert sorted(transport.sent) == [f"text {n}" for n in range(7)]
    assert are_of(vectors(tmp_path / "out"), [f"text {n % 7}" for n in range(100)])
    assert not (tmp_path / "out" / ".vectors").exists()


def test_instructions_are_set_in_and_kept_in_the_identity(tmp_path: Path, over: Over) -> None:
    transport = ScriptedTransport()
    client = over(transport, document_instruction="Document: {text}")
    manifest = embed_corpus(texts(tmp_path / "in.jsonl", "a"), tmp_path / "out", client)
    assert transport.sent == ["Document: a"]
    assert manifest.job.identity == client.vector_identity.to_dict()
    metadata = pq.read_schema(tmp_path / "out/shards/part-000000.parquet").metadata
    assert json.loads(metadata[b"kalm"]) == manifest.job.identity


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_vectors_are_lists_of_a_fixed_size(tmp_path: Path, over: Over, dtype: str) -> None:
    client = over(ScriptedTransport(), vector_dtype=dtype)
    embed_corpus(texts(tmp_path / "in.jsonl", "a"), tmp_path / "out", client)
    kind = table_of(tmp_path / "out").schema.field("vector").type
    arrow = {"float16": pa.float16(), "float32": pa.float32()}[dtype]
    assert (kind.list_size, kind.value_type) == (DIMENSIONS, arrow)


def test_int8_vectors_are_beside_the_others_by_one_calibration(tmp_path: Path, over: Over) -> None:
    options = Options(shard_rows=2, on_error="null", also="int8")
    source = texts(tmp_path / "in.jsonl", None, "", *"abc", None, "d")
    manifest = embed_corpus(source, tmp_path / "out", over(ScriptedTransport()), options)
    assert manifest.calibration
    table = table_of(tmp_path / "out")
    kind = table.schema.field("vector_int8").type
    assert (kind.list_size, kind.value_type) == (DIMENSIONS, pa.int8())
    rows = zip(table["vector"].to_pylist(), table["vector_int8"].to_pylist(), strict=True)
    for vector, codes in rows:
        assert (vector is None) == (codes is None)
        if vector is not None:
            (expected,) = manifest.calibration.encode(np.array([vector])).tolist()
            assert codes == expected
    stored = Manifest.read(tmp_path / "out")
    assert stored
    assert stored.calibration == manifest.calibration
    _, second, third, last = read(tmp_path / "out")
    assert second.texts + third.texts + last.texts == ["a", "b", "c", "d"]
    assert third.int8 is not None
    assert np.array_equal(third.int8, manifest.calibration.encode(third.vectors))
    assert third.metadata() == [{"id": "n4"}]


def test_a_resumed_job_keeps_the_calibration_of_its_first_shard(tmp_path: Path, over: Over) -> None:
    source = texts(tmp_path / "in.jsonl", *(f"text {n}" for n in range(12)))
    options, one = Options(shard_rows=4, also="int8"), {"batch_size": 2, "max_concurrency": 1}
    failing = ScriptedTransport([*[None] * 4, *[InvalidResponseError("broken")] * 9])
    with pytest.raises(InvalidResponseError):
        embed_corpus(source, tmp_path / "out", over(failing, **one), options)
    embed_corpus(source, tmp_path / "out", over(ScriptedTransport(), **one), options)
    embed_corpus(source, tmp_path / "whole", over(ScriptedTransport(), **one), options)
    assert table_of(tmp_path / "out").equals(table_of(tmp_path / "whole"))
    with pytest.raises(ConfigurationError, match="also was 'int8', and is None"):
        embed_corpus(source, tmp_path / "out", over(ScriptedTransport()), Options(shard_rows=4))


def test_few_shards_are_open_while_one_waits_for_its_last_vector(
    tmp_path: Path, over: Over
) -> None:
    transport = ScriptedTransport(delay=lambda request: 0.5 if "text 0" in request.texts else 0.0)
    source = texts(tmp_path / "in.jsonl", *(f"text {n}" for n in range(100)))
    client = over(transport, batch_size=2)
    seen: list[int] = []

    class Screen(Progress):
        def embedded(self, rows: int, tokens: int, rejected: int) -> None:
            if transport.in_flight and not (tmp_path / "out/shards/part-000000.parquet").exists():
                seen.append(len(transport.sent))

    embed_corpus(source, tmp_path / "out", client, SMALL, Screen())
    assert max(seen) <= 3 * 4
    assert are_of(vectors(tmp_path / "out"), [f"text {n}" for n in range(100)])


# --- kinds of input


def test_columns_of_json_keep_their_values(tmp_path: Path, over: Over) -> None:
    rows = [
        {"text": "a", "n": 1, "x": 1, "flag": True, "list": [1, "b"], "none": None, "mixed": 1},
        {"text": "b", "n": 2.5, "x": None, "flag": None, "list": None, "mixed": "one"},
        {"text": "c", "late": "é", "big": 2**70},
    ]
    embed_corpus(lines(tmp_path / "in.jsonl", *rows), tmp_path / "out", over(ScriptedTransport()))
    made = table_of(tmp_path / "out").drop_columns(["vector"])
    assert made.column_names == [
        "text", "n", "x", "flag", "list", "none", "mixed", "late", "big"
    ]  # fmt: skip
    assert made["n"].to_pylist() == [1.0, 2.5, None]
    assert made["x"].to_pylist() == [1, None, None]
    assert made["flag"].to_pylist() == [True, None, None]
    assert made["list"].to_pylist() == ['[1, "b"]', None, None]
    assert made["mixed"].to_pylist() == ["1", '"one"', None]
    assert made["late"].to_pylist() == [None, None, "é"]
    assert made["big"].to_pylist() == [None, None, str(2**70)]


def test_a_csv_is_text_and_nothing_else(tmp_path: Path, over: Over) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(
        b'\xef\xbb\xbfid,body\r\n007,"one,\ntwo ""three"""\r\n\r\n1e5,\xc3\xa9\r\n'
        b"too,many,fields\r\n8,\xff\r\n"
    )
    options = Options(text_column="body", id_column="id", on_error="null")
    embed_corpus(source, tmp_path / "out", over(ScriptedTransport()), options)
    made = table_of(tmp_path / "out")
    assert made["id"].to_pylist()[:2] == ["007", "1e5"]
    wanted = ['one,\ntwo "three"', "é", None, None]
    assert are_of(vectors(tmp_path / "out"), wanted)
    reasons = pq.read_table(tmp_path / "out/rejected.parquet")["reason"].to_pylist()
    assert "has 3 fields, and the header 2" in reasons[0]
    assert reasons[1] == "is not UTF-8: byte 0xff at position 0"


def test_parquet_keeps_its_types(tmp_path: Path, over: Over) -> None:
    given = pa.table(
        {
            "when": pa.array([datetime(2026, 1, 2, tzinfo=UTC), None], pa.timestamp("us", "UTC")),
            "price": pa.array([Decimal("1.50"), None], pa.decimal128(9, 2)),
            "tags": pa.array([["x"], []], pa.list_(pa.string())),
            "body": pa.array(["a", "b"]).dictionary_encode(),
            "small": pa.array([1, 2], pa.int8()),
        }
    )
    pq.write_table(given, tmp_path / "in.parquet")
    options = Options(text_column="body")
    embed_corpus(tmp_path / "in.parquet", tmp_path / "out", over(ScriptedTransport()), options)
    made = table_of(tmp_path / "out")
    assert made.drop_columns(["vector", "body"]).equals(given.drop_columns(["body"]))
    assert made["body"].to_pylist() == ["a", "b"]


def test_broken_text_in_parquet_is_a_bad_row(tmp_path: Path, over: Over) -> None:
    raw = pa.array([b"fine", b"\xff\xfe", None], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "in.parquet")
    options = Options(on_error="null")
    embed_corpus(tmp_path / "in.parquet", tmp_path / "out", over(ScriptedTransport()), options)
    assert are_of(vectors(tmp_path / "out"), ["fine", None, None])
    rejected = pq.read_table(tmp_path / "out/rejected.parquet")
    assert rejected["reason"].to_pylist() == [
        "is not UTF-8: byte 0xff at position 0", "is None, not a string"
    ]  # fmt: skip


def test_text_files_have_a_text_a_line_and_documents_are_one(tmp_path: Path, over: Over) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text("not this")
    (folder / "b.txt").write_bytes(b"one\r\n\n two \n\xff\n")
    (folder / "deep" / "a.md").write_text("# A\n\nwhole\n")
    options = Options(on_error="skip", id_column="place")
    embed_corpus(folder, tmp_path / "out", over(ScriptedTransport()), options)
    made = table_of(tmp_path / "out")
    assert made["text"].to_pylist() == ["one", " two ", "# A\n\nwhole\n"]
    assert made["place"].to_pylist() == ["b.txt line 1", "b.txt line 3", "a.md"]


def test_several_files_are_one_corpus_in_the_order_of_their_names(
    tmp_path: Path, over: Over
) -> None:
    for name in ("b", "a", "c"):
        lines(tmp_path / f"{name}.jsonl", *({"text": f"{name}{n}"} for n in range(3)))
    embed_corpus(str(tmp_path / "*.jsonl"), tmp_path / "out", over(ScriptedTransport()), SMALL)
    assert table_of(tmp_path / "out")["text"].to_pylist() == [
        f"{x}{n}" for x in "abc" for n in (0, 1, 2)
    ]


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (lambda p: p, {}, r"there is no .*in\.jsonl"),
        (lines, {}, "no text at all"),
        (
            lambda p: texts(p, "a"),
            {"text_column": "body"},
            "has no column 'body', but 'id'",
        ),
        (lambda p: texts(p, "a"), {"id_column": "key"}, "no column 'key', but 'id', 'text'"),
        (lambda p: lines(p, {"text": "a", "vector": 1}), {}, "has a column 'vector' already"),
    ],
)
def test_what_cannot_be_a_job_is_refused_before_anything_is_sent(
    tmp_path: Path, over: Over, make: Any, options: Any, said: str
) -> None:
    transport = ScriptedTransport()
    with pytest.raises((ConfigurationError, InvalidInputError), match=said):
        embed_corpus(
            make(tmp_path / "in.jsonl"), tmp_path / "out", over(transport), Options(**options)
        )
    assert transport.sent == []
    assert not (tmp_path / "out").exists()


def test_files_of_several_kinds_are_refused(tmp_path: Path, over: Over) -> None:
    texts(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.csv").write_text("text\nb\n")
    with pytest.raises(ConfigurationError, match=r"several kinds \(\.csv, \.jsonl\)"):
        embed_corpus(tmp_path, tmp_path / "out", over(ScriptedTransport()))


def test_parquet_of_another_schema_or_without_text_is_refused(tmp_path: Path, over: Over) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "b.parquet")
    with pytest.raises(ConfigurationError, match=r"b\.parquet has other columns"):
        embed_corpus(str(tmp_path / "*.parquet"), tmp_path / "out", over(ScriptedTransport()))
    pq.write_table(pa.table({"text": [1]}), tmp_path / "c.parquet")
    with pytest.raises(ConfigurationError, match="column 'text' is int64, not text"):
        embed_corpus(tmp_path / "c.parquet", tmp_path / "out", over(ScriptedTransport()))


# --- bad rows


def test_texts_stay_texts_whatever_stands_in_bad_rows(tmp_path: Path, over: Over) -> None:
    source = tmp_path / "in.jsonl"
    lines = ['{"text": "a"}', '{"text": 17}', '{"text": null}', '{"text": ["b"]}', '{"text": "c"}']
    source.write_text("\n".join(lines))
    for on_error, expected in (("skip", ["a", "c"]), ("null", ["a", "17", None, '["b"]', "c"])):
        out = tmp_path / on_error
        embed_corpus(source, out, over(ScriptedTransport()), Options(on_error=on_error))
        assert pq.read_table(out / "shards")["text"].to_pylist() == expected
        (rows,) = read(out)
        assert rows.texts == ["a", "c"]
        assert np.array_equal(rows.vectors, vectors_of(["a", "c"]))


def test_bad_rows_are_named_by_their_places_and_nothing_is_sent(tmp_path: Path, over: Over) -> None:
    transport = ScriptedTransport()
    source = lines(tmp_path / "in.jsonl", {"text": "a"}, {"text": None}, b"{", b'{"text": "\xff"}')
    with pytest.raises(InvalidInputError) as caught:
        embed_corpus(source, tmp_path / "out", over(transport))
    said = str(caught.value)
    assert "3 of 4 rows cannot be embedded" in said
    assert "in.jsonl line 2 is None, not a string" in said
    assert "in.jsonl line 3 is not JSON" in said
    assert "in.jsonl line 4 is not UTF-8: byte 0xff" in said
    assert "--on-error" in said
    assert transport.sent == []


def test_what_only_the_model_can_tell_is_named_by_its_place_too(tmp_path: Path, over: Over) -> None:
    def refuse(request: EmbedRequest) -> None:
        for index, text in enumerate(request.texts):
            if text == "long":
                raise InputTooLongError.of([InvalidText(index, "is too long: 9,000 tokens")])

    client = over(ScriptedTransport(refuse=refuse), batch_size=2)
    source = texts(tmp_path / "in.jsonl", *"abcdefgh", "long", "i")
    with pytest.raises(BadRowsError, match=r"\(in\.jsonl line 9\) is too long.*KALM_TRUNCATE=end"):
        embed_corpus(source, tmp_path / "out", client, SMALL)
    finished = Manifest.read(tmp_path / "out")
    assert finished
    assert len(finished.shards) == 2


def test_a_huge_text_is_cut_where_that_was_asked_for(tmp_path: Path, over: Over) -> None:
    transport = ScriptedTransport()
    source = texts(tmp_path / "in.jsonl", "x" * 300_000)
    with pytest.raises(InvalidInputError, match="is too long: 300,000 characters"):
        embed_corpus(source, tmp_path / "out", over(transport))
    embed_corpus(source, tmp_path / "out", over(transport, truncate="end"))
    assert [len(text) for text in transport.sent] == [262_145]  # the service cuts the last one


# --- resumed, or refused


def halted(tmp_path: Path, over: Over, **client: Any) -> tuple[Path, Path]:
    """A job of ten shards whose service died in the middle of it."""
    source = texts(tmp_path / "in.jsonl", *(f"text {n % 30}" for n in range(40)))
    dead = [ServiceUnavailableError("The service is gone.")] * 99
    transport = ScriptedTransport([None, *[None] * 9, *dead])
    with pytest.raises(ServiceUnavailableError):
        embed_corpus(
            source,
            tmp_path / "out",
            over(transport, batch_size=2, max_concurrency=1, max_retries=0, **client),
            SMALL,
        )
    return source, tmp_path / "out"


def test_a_service_that_is_gone_for_a_while_is_waited_for(
    tmp_path: Path, over: Over, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalm_integrations.retry.LONGEST_DELAY", 0.001)
    source = texts(tmp_path / "in.jsonl", "a", "b", "c")
    gone = ServiceUnavailableError("The service is gone.")
    one = {"batch_size": 1, "max_concurrency": 1}
    asked_for = over(ScriptedTransport([None, None, *[gone] * 20]), **one, max_retries=7)
    with pytest.raises(ServiceUnavailableError):
        embed_corpus(source, tmp_path / "out", asked_for, SMALL)
    # Three times as often as a client is patient by itself.
    done = embed_corpus(
        source, tmp_path / "out", over(ScriptedTransport([None, *[gone] * 20]), **one), SMALL
    )
    assert done.complete
    assert are_of(vectors(tmp_path / "out"), ["a", "b", "c"])


def test_what_was_finished_survives_and_the_same_call_goes_on(tmp_path: Path, over: Over) -> None:
    source, out = halted(tmp_path, over)
    before = Manifest.read(out)
    assert before
    assert 0 < len(before.shards) < 10
    assert not before.complete
    with pytest.raises(ConfigurationError, match="is not finished: run it again"):
        read(out)
    transport = ScriptedTransport()
    after = embed_corpus(source, out, over(transport, batch_size=2), SMALL)
    assert after.complete
    assert after.runs == 2
    assert after.shards[: len(before.shards)] == before.shards
    sent = 4 * len(before.shards)
    assert not {f"text {n}" for n in range(sent)} & set(transport.sent)
    assert are_of(vectors(out), [f"text {n % 30}" for n in range(40)])


def test_a_finished_job_sends_nothing_again(tmp_path: Path, over: Over) -> None:
    source = texts(tmp_path / "in.jsonl", "a", "b")
    first = embed_corpus(source, tmp_path / "out", over(ScriptedTransport()))
    transport = ScriptedTransport()
    assert embed_corpus(source, tmp_path / "out", over(transport)) == first
    assert transport.sent == []


def test_a_rejected_text_is_not_asked_for_again_after_a_break(tmp_path: Path, over: Over) -> None:
    def refuse(request: EmbedRequest) -> None:
        bad = [InvalidText(i, "is odd") for i, text in enumerate(request.texts) if text == "odd"]
        if bad:
            raise InvalidInputError.of(bad)

    source = texts(tmp_path / "in.jsonl", "a", "odd", "b", "c", "d", "odd")
    options = Options(shard_rows=2, on_error="null")
    dead = ServiceUnavailableError("The service is gone.")
    one = {"batch_size": 2, "max_concurrency": 1, "max_retries": 0}
    late = ScriptedTransport(
        [None, None, None, *[dead] * 9],
        delay=lambda request: 0.5 * ("c" in request.texts),  # the first shard is written meanwhile
        refuse=refuse,
    )
    first = over(late, **one)
    with pytest.raises(ServiceUnavailableError):
        embed_corpus(source, tmp_path / "out", first, options)
    second = ScriptedTransport(refuse=refuse)
    embed_corpus(source, tmp_path / "out", over(second, **one), options)
    assert "odd" not in second.sent
    assert are_of(vectors(tmp_path / "out"), ["a", None, "b", "c", "d", None])


def test_a_changed_input_is_refused(tmp_path: Path, over: Over) -> None:
    source, out = halted(tmp_path, over)
    source.write_bytes(source.read_bytes() + b'{"text": "one more"}\n')
    with pytest.raises(ConfigurationError, match=r"holds another job: changed input: in\.jsonl"):
        embed_corpus(source, out, over(ScriptedTransport()), SMALL)


@pytest.mark.parametrize(
    ("client", "options", "said"),
    [
        ({}, {"shard_rows": 5}, "shard_rows was 4, and is 5"),
        ({}, {"on_error": "null"}, "on_error was 'fail', and is 'null'"),
        ({"vector_dtype": "float32"}, {}, "vector_dtype was 'float16', and is 'float32'"),
        ({"truncate": "end"}, {}, "truncate was 'error', and is 'end'"),
    ],
)
def test_other_options_are_refused(
    tmp_path: Path, over: Over, client: Any, options: Any, said: str
) -> None:
    source, out = halted(tmp_path, over)
    with pytest.raises(ConfigurationError, match=said):
        embed_corpus(
            source,
            out,
            over(ScriptedTransport(), **client),
            Options(**{"shard_rows": 4, **options}),
        )


def test_vectors_of_another_space_are_refused(tmp_path: Path, over: Over) -> None:
    source, out = halted(tmp_path, over)
    other = over(ScriptedTransport(), document_instruction="Other: {text}")
    with pytest.raises(IdentityMismatchError, match="document_template"):
        embed_corpus(source, out, other, SMALL)


@pytest.mark.parametrize("damage", ["missing", "flipped bits", "other rows"])
def test_kept_vectors_that_were_damaged_are_computed_again(
    tmp_path: Path, over: Over, damage: str
) -> None:
    source, out = halted(tmp_path, over)
    for path in (out / ".vectors").iterdir():
        content = np.fromfile(path, dtype=np.uint8)
        if damage == "missing":
            path.unlink()
        elif damage == "flipped bits":
            (content ^ 1).tofile(path)
        else:
            np.roll(content, 16 + 1 + 2 * DIMENSIONS + 8).tofile(path)
    embed_corpus(source, out, over(ScriptedTransport(), batch_size=2), SMALL)
    assert are_of(vectors(out), [f"text {n % 30}" for n in range(40)])


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path, over: Over) -> None:
    source, out = halted(tmp_path, over)
    (out / "shards" / ".part-000009.parquet.tmp").write_bytes(b"half")
    (out / ".manifest.json.tmp").write_bytes(b"half")
    embed_corpus(source, out, over(ScriptedTransport()), SMALL)
    assert not list(out.rglob("*.tmp"))


def test_two_processes_cannot_work_in_one_folder(tmp_path: Path, over: Over) -> None:
    source = texts(tmp_path / "in.jsonl", *(f"text {n}" for n in range(20)))
    slow = over(ScriptedTransport(delay=lambda _: 0.3))
    working = threading.Thread(target=embed_corpus, args=(source, tmp_path / "out", slow, SMALL))
    working.start()
    while not (tmp_path / "out" / "manifest.json").exists():
        pass
    with pytest.raises(ConfigurationError, match="another process is at work in"):
        embed_corpus(source, tmp_path / "out", over(ScriptedTransport()), SMALL)
    working.join()
    assert are_of(vectors(tmp_path / "out"), [f"text {n}" for n in range(20)])


def test_a_manifest_of_another_version_is_left_alone(tmp_path: Path, over: Over) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(ConfigurationError, match="is not valid in this version"):
        embed_corpus(texts(tmp_path / "in.jsonl", "a"), tmp_path / "out", over(ScriptedTransport()))


# --- before, and after


def test_an_estimate_sends_nothing_and_writes_nothing(tmp_path: Path, over: Over) -> None:
    transport = ScriptedTransport()
    source = texts(tmp_path / "in.jsonl", "four" * 10, "four" * 10, "é" * 8)
    found = estimate(source, over(transport))
    assert (found.rows, found.distinct, found.bad, found.tokens) == (3, 2, 0, 11 + 5)
    assert transport.requests == []
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_rows_are_read_back_with_ids_and_columns(tmp_path: Path, over: Over) -> None:
    client = over(ScriptedTransport())
    source = texts(tmp_path / "in.jsonl", *"abc", None, *"de")
    options = Options(shard_rows=4, id_column="id", on_error="null")
    embed_corpus(source, tmp_path / "out", client, options)
    parts = list(read(tmp_path / "out", expected=client.vector_identity))
    assert [part.texts for part in parts] == [["a", "b", "c"], ["d", "e"]]
    assert [part.ids for part in parts] == [["n0", "n1", "n2"], ["n4", "n5"]]
    assert np.array_equal(parts[1].vectors, vectors_of(["d", "e"]))
    assert parts[0].metadata() == [{"id": "n0"}, {"id": "n1"}, {"id": "n2"}]


def test_a_job_of_another_space_is_not_read_for_an_index(tmp_path: Path, over: Over) -> None:
    embed_corpus(texts(tmp_path / "in.jsonl", "a"), tmp_path / "out", over(ScriptedTransport()))
    other = over(ScriptedTransport(), document_instruction="Other: {text}")
    with pytest.raises(IdentityMismatchError):
        read(tmp_path / "out", expected=other.vector_identity)
    with pytest.raises(ConfigurationError, match=r"has no manifest\.json"):
        read(tmp_path / "in.jsonl")
