"""Dirty input: kept bit for bit, or refused by file and row before anything is sent."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_corpora import table_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import ScriptedTransport, vectors_of

from kalm_integrations import KalmClient
from kalm_integrations.bulk import Options, embed_corpus, estimate, read
from kalm_integrations.bulk.local import Progress
from kalm_integrations.errors import BadRowsError, ConfigurationError, KalmError

Over = Callable[..., KalmClient]


# --- Arrow types


def broken_text(*values: bytes, kind: pa.DataType | None = None) -> pa.Array:
    """Strings whose bytes nobody has checked, as some writers of Parquet leave them."""
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(kind or pa.string(), len(values), raw.buffers())


def integers(bits: int) -> st.SearchStrategy[int]:
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


DAY_MS = 86_400_000
LEAVES: list[tuple[pa.DataType, pa.DataType, st.SearchStrategy[Any]]] = [
    # type, type from which it is cast, its values
    (pa.int8(), pa.int8(), integers(8)),
    (pa.uint64(), pa.uint64(), st.integers(0, 2**64 - 1)),
    (pa.int64(), pa.int64(), integers(64)),
    (pa.float16(), pa.float16(), st.floats(width=16, allow_nan=False)),
    (pa.float64(), pa.float64(), st.floats(allow_nan=False)),
    (pa.bool_(), pa.bool_(), st.booleans()),
    (pa.string(), pa.string(), st.text(max_size=4)),
    (pa.large_string(), pa.large_string(), st.text(max_size=4)),
    (pa.string_view(), pa.string_view(), st.text(max_size=20)),
    (pa.binary(), pa.binary(), st.binary(max_size=4)),
    (pa.binary_view(), pa.binary_view(), st.binary(max_size=20)),
    (pa.binary(3), pa.binary(3), st.binary(min_size=3, max_size=3)),
    (pa.date32(), pa.int32(), integers(32)),
    (pa.timestamp("ms"), pa.int64(), integers(64)),
    (pa.timestamp("us", "UTC"), pa.int64(), integers(64)),
    (pa.timestamp("ns", "Europe/Oslo"), pa.int64(), integers(64)),
    (pa.time32("ms"), pa.int32(), st.integers(0, DAY_MS - 1)),
    (pa.time64("us"), pa.int64(), st.integers(0, DAY_MS * 10**3 - 1)),
    (pa.time64("ns"), pa.int64(), st.integers(0, DAY_MS * 10**6 - 1)),
    (pa.duration("ns"), pa.int64(), integers(64)),
    (pa.decimal128(38, 6), pa.decimal128(38, 6), st.decimals(-(10**30), 10**30, places=6)),
    (pa.decimal256(60, 2), pa.decimal256(60, 2), st.decimals(-(10**50), 10**50, places=2)),
    (pa.uuid(), pa.binary(16), st.binary(min_size=16, max_size=16)),
    (pa.bool8(), pa.int8(), st.sampled_from([0, 1])),
    (pa.json_(), pa.string(), st.just('{"a": 1}')),
]


def leaf(kind: pa.DataType, stored: pa.DataType, values: list[Any]) -> pa.Array:
    array = pa.array(values, stored)
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, array)
    return array if kind == stored else array.cast(kind)


@st.composite
def arrays(draw: st.DrawFn, rows: int, depth: int = 2) -> pa.Array:
    """A column of any type that Parquet keeps, nested ones included."""
    shapes = ["leaf"] * 4
    if depth:
        shapes += ["list", "struct", "map"]
    if depth == 2:  # Arrow compares nested dictionaries by their order, which is free
        shapes += ["dictionary"]
    shape = draw(st.sampled_from(shapes))
    if shape == "leaf":
        # Arrow itself cannot write views within a struct in several row groups.
        some_leaves = LEAVES if depth == 2 else [x for x in LEAVES if "view" not in str(x[0])]
        kind, stored, values = draw(st.sampled_from(some_leaves))
        some = st.lists(st.none() | values, min_size=rows, max_size=rows)
        return leaf(kind, stored, draw(some))
    if shape == "dictionary":
        words = draw(st.lists(st.text(max_size=3), min_size=1, max_size=4, unique=True))
        chosen = st.lists(st.none() | st.sampled_from(words), min_size=rows, max_size=rows)
        return pa.array(draw(chosen), pa.string()).dictionary_encode()
    if shape == "struct":
        children = [draw(arrays(rows, depth - 1)) for _ in range(draw(st.integers(1, 2)))]
        mask = pa.array(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), pa.bool_())
        names = [f"f{number}" for number in range(len(children))]
        return pa.StructArray.from_arrays(children, names=names, mask=mask)
    sizes = draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
    offsets = pa.array(np.cumsum([0, *sizes]), pa.int32())
    items = draw(arrays(sum(sizes), depth - 1))
    if shape == "map":
        keys = pa.array([f"k{number}" for number in range(sum(sizes))], pa.string())
        return pa.MapArray.from_arrays(offsets, keys, items)
    kind = draw(st.sampled_from([pa.ListArray, pa.LargeListArray]))
    if kind is pa.LargeListArray:
        offsets = offsets.cast(pa.int64())
    return kind.from_arrays(offsets, items)


def decoded(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return whole.dictionary_decode() if pa.types.is_dictionary(whole.type) else whole


@settings(max_examples=80, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data(), rows=st.integers(1, 12), group=st.integers(1, 12), size=st.integers(1, 7))
def test_columns_of_any_type_come_out_as_they_went_in(
    tmp_path_factory: pytest.TempPathFactory,
    over: Over,
    data: st.DataObject,
    rows: int,
    group: int,
    size: int,
) -> None:
    folder = tmp_path_factory.mktemp("types")
    columns = {f"c{n}": data.draw(arrays(rows)) for n in range(data.draw(st.integers(1, 3)))}
    given_table = pa.table({"text": [f"text {n}" for n in range(rows)], **columns})
    pq.write_table(given_table, folder / "in.parquet", row_group_size=group)
    before = pq.read_table(folder / "in.parquet")  # what Parquet itself makes of the types
    embed_corpus(
        folder / "in.parquet", folder / "out", over(ScriptedTransport()), Options(shard_rows=size)
    )
    after = table_of(folder / "out").drop_columns(["vector"])
    assert after.schema.equals(before.schema)
    for name in before.column_names:
        assert decoded(after[name]).equals(decoded(before[name])), name


def broken_dictionary() -> pa.Array:
    values = broken_text(b"a", b"\xff", b"c")
    return pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int32()), values)


BROKEN: dict[str, Any] = {
    "text": lambda: {"text": broken_text(b"caf\xe9", b"good", b"good too")},
    "another column": lambda: {"x": broken_text(b"a", b"\xff\xfe", b"c")},
    "a large one": lambda: {
        "x": broken_text(b"a", b"\xff", b"c").cast(pa.large_string(), safe=False)
    },
    "a struct": lambda: {
        "x": pa.StructArray.from_arrays([broken_text(b"a", b"\xff", b"c")], ["f"])
    },
    "a list": lambda: {
        "x": pa.ListArray.from_arrays(
            pa.array([0, 0, 2, 3], pa.int32()), broken_text(b"a", b"\xff", b"c")
        )
    },
    "a dictionary": lambda: {"x": broken_dictionary()},
    "a dictionary in a struct": lambda: {
        "x": pa.StructArray.from_arrays([broken_dictionary()], ["f"])
    },
    "a column without nulls": lambda: {
        "x": pa.StructArray.from_arrays(
            [broken_text(b"a", b"\xff", b"c")], fields=[pa.field("f", pa.string(), nullable=False)]
        )
    },
    "keys of a map": lambda: {
        "x": pa.MapArray.from_arrays(
            pa.array([0, 1, 2, 3], pa.int32()),
            broken_text(b"a", b"\xff", b"c"),
            pa.array([1, 2, 3]),
        )
    },
}


@pytest.mark.parametrize("where", BROKEN)
def test_text_that_is_not_utf8_is_a_bad_row_whatever_column_it_is_in(
    tmp_path: Path, over: Over, where: str
) -> None:
    texts = pa.array(["one", "two", "three"])
    source = tmp_path / "in.parquet"
    table = pa.table({"text": texts} | BROKEN[where]())
    if where == "a column without nulls":
        schema = [field.with_nullable(False) for field in table.schema]
        table = table.cast(pa.schema(schema))
    pq.write_table(table, source)
    bad = 0 if where == "text" else 1
    transport = ScriptedTransport()
    with pytest.raises(BadRowsError, match=rf"in\.parquet row {bad} .*is not UTF-8"):
        embed_corpus(source, tmp_path / "no", over(transport))
    assert transport.requests == []
    embed_corpus(source, tmp_path / "out", over(transport), Options(on_error="null"))
    rejected = pq.read_table(tmp_path / "out/rejected.parquet")
    assert rejected["row"].to_pylist() == [bad]
    made = table_of(tmp_path / "out")
    assert made["vector"].is_null().to_pylist() == [row == bad for row in range(3)]
    broken = "text" if where == "text" else "x"
    assert made[broken].is_null().to_pylist()[bad]
    made.validate(full=True)


def test_int96_dates_that_do_not_fit_nanoseconds_are_bad_rows(tmp_path: Path, over: Over) -> None:
    days = [0, 253402300799, -62135596800, None]  # year 9999, year 1
    dates = pa.array([d if d is None else d * 10**6 for d in days], pa.timestamp("us"))
    table = pa.table({"text": list("abcd"), "x": dates, "y": pa.array([[d] for d in dates])})
    source = tmp_path / "in.parquet"
    pq.write_table(table, source, use_deprecated_int96_timestamps=True)
    embed_corpus(source, tmp_path / "out", over(ScriptedTransport()), Options(on_error="null"))
    rejected = pq.read_table(tmp_path / "out/rejected.parquet")
    assert rejected["row"].to_pylist() == [1, 2]
    made = table_of(tmp_path / "out")
    assert made["x"].type == pa.timestamp("ns")
    assert made["x"].cast(pa.int64()).to_pylist() == [0, None, None, None]
    assert made["y"].is_null().to_pylist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"in\.parquet is empty"),
        (b"text\nhello\n", r"in\.parquet is not Parquet"),
        (b"PAR1" + b"x" * 100, r"in\.parquet is truncated"),
    ],
)
def test_broken_files_are_named_before_anything_is_sent(
    tmp_path: Path, over: Over, content: bytes, message: str
) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "in.parquet").write_bytes(content)
    transport = ScriptedTransport()
    with pytest.raises(ConfigurationError, match=message):
        embed_corpus(str(tmp_path / "*.parquet"), tmp_path / "out", over(transport))
    assert transport.requests == []


def test_a_damaged_page_is_found_before_anything_is_sent(tmp_path: Path, over: Over) -> None:
    random = Random(0)  # other damage may give other text, which nobody can see
    texts = [f"{n} {random.randbytes(30).hex()}" for n in range(3000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet", compression="zstd")
    content = bytearray((tmp_path / "in.parquet").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 50] = bytes(50)
    (tmp_path / "in.parquet").write_bytes(content)
    transport = ScriptedTransport()
    with pytest.raises(KalmError, match=r"in\.parquet"):
        embed_corpus(tmp_path / "in.parquet", tmp_path / "out", over(transport))
    assert transport.requests == []


def test_two_columns_of_one_name_are_refused(tmp_path: Path, over: Over) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["text", "x", "x"])
    pq.write_table(twice, tmp_path / "in.parquet")
    with pytest.raises(ConfigurationError, match="two columns named 'x'"):
        embed_corpus(tmp_path / "in.parquet", tmp_path / "out", over(ScriptedTransport()))


# --- CSV


def csv(tmp_path: Path, content: bytes | str, name: str = "in.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            'id,text\n1,fine\n2,"never closed\n' + "3,more\n" * 50,
            r"in\.csv row 2 \(line 3\): a quote",
        ),
        ('id,text\n1,"open\n2,text\n3,"closed\n', r"in\.csv row 1 \(line 2\): a quote"),
        ('id,text\n1,"a" b\n', r"in\.csv row 1 \(line 2\): a quote"),
        (
            "id,text\n1,one\n2\n3,three,more\n",
            r"2 of 3 rows.*row 2 has 1 fields.*row 3 has 3 fields",
        ),
        ("id,café,text\n1,x,a\n".encode("latin-1"), r"the header is not UTF-8.*--encoding"),
        ("id,text\n1,café\n".encode("latin-1"), r"row 1 is not UTF-8: byte 0xe9 at position 3"),
        ("id,x,text\n1,café,a\n".encode("latin-1"), r"row 1 column 'x' is not UTF-8: byte 0xe9"),
        ("id,text\n1,a\n".encode("utf-16"), r"the header is not UTF-8.*utf-16"),
        ("id,id,text\n1,2,a\n", "two columns of one name"),
        ("", "has no column 'text', but none"),
    ],
)
def test_csv_that_is_no_table_of_text_is_refused_by_its_row(
    tmp_path: Path, over: Over, content: Any, message: str
) -> None:
    transport = ScriptedTransport()
    with pytest.raises(KalmError, match=message):
        embed_corpus(csv(tmp_path, content), tmp_path / "out", over(transport))
    assert transport.requests == []


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-8-sig", "shift_jis"])
def test_the_encoding_of_csv_and_text_can_be_named(
    tmp_path: Path, over: Over, encoding: str
) -> None:
    word = "日本" if encoding == "shift_jis" else "Köln"
    source = csv(tmp_path, f'id,text\n1,"{word},\nzwei"\n'.encode(encoding))
    options = Options(encoding=encoding)
    embed_corpus(source, tmp_path / "out", over(ScriptedTransport()), options)
    assert table_of(tmp_path / "out")["text"].to_pylist() == [f"{word},\nzwei"]
    lines = csv(tmp_path, f"{word}\nzwei\n".encode(encoding), "in.txt")
    embed_corpus(lines, tmp_path / "lines", over(ScriptedTransport()), options)
    assert table_of(tmp_path / "lines")["text"].to_pylist() == [word, "zwei"]
    with pytest.raises(ConfigurationError, match="--encoding"):
        estimate(csv(tmp_path, "{}", "in.jsonl"), over(ScriptedTransport()), options)


def test_an_unknown_encoding_is_refused(tmp_path: Path, over: Over) -> None:
    for name in ("utf-9", "hex"):
        with pytest.raises(ConfigurationError, match=f"--encoding {name}"):
            estimate(csv(tmp_path, "text\na\n"), over(ScriptedTransport()), Options(encoding=name))


# --- JSON Lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a", "x": 1, "x": 2}', "line 1 has the key 'x' twice"),
        (b'{"text": "a", "x": {"y": 1, "y": 2}}', "line 1 has the key 'y' twice"),
        (b'{"text": "a", "text": "b"}', "line 1 has the key 'text' twice"),
        (b'{"text": "a", "x" : 1, "x"\t:2}', "line 1 has the key 'x' twice"),
        (b'{"text": "\\":", "x":1, "x":2}', "line 1 has the key 'x' twice"),
        (b'{"text": "a", "x": "\\ud800"}', "line 1 column 'x' has a lone surrogate"),
        (b'{"text": "a", "\\udfff": 1}', "line 1 has a key with a lone surrogate"),
        (b'{"text": "\\ud83d"}', "line 1 has a lone surrogate"),
        (b'{"text": "a", "x": "caf\xe9"}', "line 1 is not UTF-8: byte 0xe9"),
        (b'{"text": "a", "x": 1e999}', "line 1 has the number 1e999"),
        (b'[{"text": "a"}]', "line 1 is no JSON object, but list"),
        (b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_lines_that_would_lose_something_are_bad_rows(
    tmp_path: Path, over: Over, line: bytes, message: str
) -> None:
    source = csv(tmp_path, line + b'\n{"text": "good"}\n', "in.jsonl")
    transport = ScriptedTransport()
    with pytest.raises(BadRowsError, match=message):
        embed_corpus(source, tmp_path / "no", over(transport))
    assert transport.requests == []
    embed_corpus(source, tmp_path / "out", over(transport), Options(on_error="null"))
    assert table_of(tmp_path / "out")["vector"].is_null().to_pylist() == [True, False]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2**53 + 1, 1.5], [str(2**53 + 1), "1.5"]),
        ([-(2**53) - 1, 0.5, None], [str(-(2**53) - 1), "0.5", None]),
        ([2**53, 1.5], [2.0**53, 1.5]),
        ([2**63 - 1, -(2**63)], [2**63 - 1, -(2**63)]),
        ([2**63, 1], [str(2**63), "1"]),
        ([10**400, 1], [str(10**400), "1"]),
        ([True, 1], ["true", "1"]),
        ([{"a": [1, None]}, "x"], ['{"a": [1, null]}', '"x"']),
        ([["\ud800", "é"], None], ['["\\ud800", "\\u00e9"]', None]),
        ([None, None], [None, None]),
    ],
)
def test_values_of_json_stay_exact(
    tmp_path: Path, over: Over, values: list[Any], expected: list[Any]
) -> None:
    source = tmp_path / "in.jsonl"
    rows = [{"text": f"t{n}", "x": value} for n, value in enumerate(values)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    embed_corpus(source, tmp_path / "out", over(ScriptedTransport()))
    assert table_of(tmp_path / "out")["x"].to_pylist() == expected


JSON_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3)
)
JSON_VALUES = (
    JSON_LEAVES
    | st.lists(JSON_LEAVES, max_size=2)
    | st.dictionaries(st.text(max_size=2), JSON_LEAVES, max_size=2)
)


@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
@given(values=st.lists(JSON_VALUES, min_size=1, max_size=6))
def test_json_values_can_be_read_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, over: Over, values: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("json")
    rows = [{"text": f"t{n}", "x": value} for n, value in enumerate(values)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    embed_corpus(folder / "in.jsonl", folder / "out", over(ScriptedTransport()))
    found = table_of(folder / "out")["x"].to_pylist()
    if len({type(value) for value in values if value is not None}) > 1 or any(
        isinstance(value, list | dict) for value in values
    ):
        parsed = [json.loads(v) if isinstance(v, str) else v for v in found]
        assert parsed == values
    else:
        big = any(isinstance(v, int) and not -(2**63) <= v < 2**63 for v in values)
        assert [int(v) if big and v is not None else v for v in found] == values


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.json", b'\xef\xbb\xbf [ {"text": "a", "n": 1},\n {"text": "b", "n": 2} ] '),
        ("in.json", b'{"text": "a", "n": 1}\n{"text": "b", "n": 2}'),
        ("in.ndjson", b'\xef\xbb\xbf{"text": "a", "n": 1}\r\n\r\n{"text": "b", "n": 2}\r\n'),
        ("in.jsonl.gz", gzip.compress(b'{"text": "a", "n": 1}\n{"text": "b", "n": 2}\n', mtime=0)),
    ],
)
def test_json_of_every_kind_is_read(tmp_path: Path, over: Over, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    embed_corpus(tmp_path / name, tmp_path / "out", over(ScriptedTransport()))
    assert table_of(tmp_path / "out").select(["text", "n"]).to_pylist() == [
        {"text": "a", "n": 1},
        {"text": "b", "n": 2},
    ]


@pytest.mark.parametrize("content", [b'[{"text": "a"}', b'[{"text": "a"} {"text": "b"}]', b"[1,]"])
def test_an_array_that_is_not_json_is_refused(tmp_path: Path, over: Over, content: bytes) -> None:
    (tmp_path / "in.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"in\.json item"):
        embed_corpus(tmp_path / "in.json", tmp_path / "out", over(ScriptedTransport()))


# --- files


def test_a_truncated_gzip_file_is_named(tmp_path: Path, over: Over) -> None:
    lines = b"".join(b'{"text": "number %d"}\n' % n for n in range(2000))
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(lines)[:-100])
    with pytest.raises(ConfigurationError, match=r"in\.jsonl\.gz"):
        embed_corpus(tmp_path / "in.jsonl.gz", tmp_path / "out", over(ScriptedTransport()))


def test_hive_partitions_are_columns(tmp_path: Path, over: Over) -> None:
    for year, lang in ((2023, "de"), (2024, "a%20b"), (2024, "__HIVE_DEFAULT_PARTITION__")):
        folder = tmp_path / "in" / f"year={year}" / f"lang={lang}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"text": [f"{year} {lang}"]}), folder / "part-0.parquet")
    embed_corpus(tmp_path / "in", tmp_path / "out", over(ScriptedTransport()))
    made = table_of(tmp_path / "out")
    found = set(zip(made["year"].to_pylist(), made["lang"].to_pylist(), strict=True))
    assert found == {(2023, "de"), (2024, "a b"), (2024, None)}


@pytest.mark.parametrize(
    ("paths", "message"),
    [([b"k=%FF/a.txt"], "k=%FF"), ([b"a\xff.txt", b"a\\xff.txt"], "names are the same")],
)
def test_names_that_cannot_be_told_as_text_are_refused(
    tmp_path: Path, over: Over, paths: list[bytes], message: str
) -> None:
    for path in paths:
        whole = tmp_path / "in" / os.fsdecode(path)
        whole.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text("a text\n")
    transport = ScriptedTransport()
    with pytest.raises(ConfigurationError, match=message):
        embed_corpus(tmp_path / "in", tmp_path / "out", over(transport))
    assert transport.requests == []


def test_an_address_that_fsspec_reads(tmp_path: Path, over: Over) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("b", "a"):
        with memory.open(f"/bucket/{name}.parquet", "wb") as file:
            pq.write_table(pa.table({"text": [name]}), file)
    embed_corpus("memory://bucket/", tmp_path / "out", over(ScriptedTransport()))
    assert table_of(tmp_path / "out")["text"].to_pylist() == ["a", "b"]
    embed_corpus("memory://bucket/*.parquet", tmp_path / "glob", over(ScriptedTransport()))
    with pytest.raises(ConfigurationError, match="there is no memory://bucket/none"):
        embed_corpus("memory://bucket/none.csv", tmp_path / "no", over(ScriptedTransport()))


def test_file_names_may_be_any_bytes(tmp_path: Path, over: Over) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text("a text\n")
    options = Options(id_column="place")
    manifest = embed_corpus(tmp_path / "in", tmp_path / "out", over(ScriptedTransport()), options)
    assert list(manifest.job.files) == ["caf\\xe9.txt"]
    assert table_of(tmp_path / "out")["place"].to_pylist() == ["caf\\xe9.txt line 1"]


@pytest.mark.parametrize("output", ["in/out", "in", "in/deep/out"])
def test_an_output_within_the_input_is_refused(tmp_path: Path, over: Over, output: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a text\n")
    transport = ScriptedTransport()
    with pytest.raises(ConfigurationError, match="is within the input"):
        embed_corpus(tmp_path / "in", tmp_path / output, over(transport))
    assert transport.requests == []


def test_a_glob_does_not_find_the_output(tmp_path: Path, over: Over) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    for _ in range(2):
        pattern = str(tmp_path / "**/*.parquet")
        done = embed_corpus(pattern, tmp_path / "out", over(ScriptedTransport()))
        assert list(done.job.files) == ["a.parquet"]


# --- the input changes


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "txt"])
def test_an_input_that_changes_while_it_is_embedded_is_an_error(
    tmp_path: Path, over: Over, kind: str
) -> None:
    source = tmp_path / f"in.{kind}"

    def write(word: str) -> None:
        texts = [f"{word} {n:05}" for n in range(6000)]
        if kind == "parquet":
            pq.write_table(pa.table({"text": texts}), source, row_group_size=500)
        elif kind == "jsonl":
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        else:
            source.write_text("\n".join((["text"] if kind == "csv" else []) + texts) + "\n")

    write("first")
    changed = False

    class Changing(Progress):
        def begun(self, *_: Any) -> None:
            nonlocal changed
            if not changed:
                changed = True
                write("other")

    client = over(ScriptedTransport(), batch_size=64)
    options = Options(shard_rows=512)
    with pytest.raises(ConfigurationError, match=rf"in\.{kind} changed after it was planned"):
        embed_corpus(source, tmp_path / "out", client, options, Changing())
    write("first")
    embed_corpus(source, tmp_path / "out", client, options, Changing())
    rows = list(read(tmp_path / "out"))
    assert sum(map(len, rows)) == 6000
    for part in rows:
        assert np.array_equal(part.vectors, vectors_of(part.texts))


# --- ids and columns


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pa.array([1, None, 3, 4]), r"1 of 4 rows have no ID: in\.parquet row 1"),
        (
            pa.array(["a", "b", "a", "a"]),
            r"2 of 4 rows have an ID that occurred before: 'a' \(in\.parquet row 2\)",
        ),
        (pa.array([1.0, float("nan"), 3.0, 4.0]), "1 of 4 rows have no ID"),
        (pa.array([[1], [2], [3], [4]]), "cannot be the document ID"),
        (pa.array(["a", "", "b", "c"]), "1 of 4 rows have no ID"),
    ],
)
def test_ids_that_a_store_would_drop_are_refused(
    tmp_path: Path, over: Over, ids: pa.Array, message: str
) -> None:
    pq.write_table(pa.table({"text": list("abcd"), "id": ids}), tmp_path / "in.parquet")
    transport = ScriptedTransport()
    with pytest.raises(ConfigurationError, match=message):
        embed_corpus(
            tmp_path / "in.parquet", tmp_path / "out", over(transport), Options(id_column="id")
        )
    assert transport.requests == []


def test_repeated_ids_can_be_allowed_and_bad_rows_need_none(tmp_path: Path, over: Over) -> None:
    rows = [{"text": "a", "id": 1}, {"text": "b", "id": 1.0}, {"text": "", "id": None}]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigurationError, match="1 of 3 rows have an ID that occurred before"):
        estimate(source, over(ScriptedTransport()), Options(id_column="id", on_error="skip"))
    options = Options(id_column="id", on_error="skip", allow_duplicate_ids=True)
    embed_corpus(source, tmp_path / "out", over(ScriptedTransport()), options)
    assert [part.ids for part in read(tmp_path / "out")] == [["1.0", "1.0"]]


def test_a_column_that_has_vectors_already(tmp_path: Path, over: Over) -> None:
    pq.write_table(pa.table({"text": ["a"], "vector": [[1.0]]}), tmp_path / "in.parquet")
    source, client = tmp_path / "in.parquet", over(ScriptedTransport())
    with pytest.raises(ConfigurationError, match=r"--vector-column.*--replace-vector"):
        embed_corpus(source, tmp_path / "no", client)
    embed_corpus(source, tmp_path / "other", client, Options(vector_column="v"))
    assert table_of(tmp_path / "other").column_names == ["text", "vector", "v"]
    embed_corpus(source, tmp_path / "new", client, Options(replace_vector=True))
    assert table_of(tmp_path / "new").column_names == ["text", "vector"]
    for folder in ("other", "new"):
        (rows,) = read(tmp_path / folder)
        assert np.array_equal(rows.vectors, vectors_of(["a"]))


def test_dates_that_python_does_not_have_come_as_text_in_metadata(
    tmp_path: Path, over: Over
) -> None:
    days = pa.array([2932897, 0], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"text": ["a", "b"], "day": days}), tmp_path / "in.parquet")
    embed_corpus(tmp_path / "in.parquet", tmp_path / "out", over(ScriptedTransport()))
    (rows,) = read(tmp_path / "out")
    assert rows.metadata() == [{"day": "10000-01-01"}, {"day": "1970-01-01"}]
