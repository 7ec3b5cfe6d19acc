"""Bulk jobs over several runs: damage is detected, vectors are reused, limits and cut texts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from bulk_corpora import SMALL
from bulk_corpora import texts as corpus
from scripted import ScriptedTransport, vectors_of

from kalm_integrations import KalmClient, cli
from kalm_integrations.bulk import Options, embed_corpus, read
from kalm_integrations.bulk.manifest import Manifest
from kalm_integrations.errors import (
    BadRowsError,
    ConfigurationError,
    IdentityMismatchError,
    InputTooLongError,
    InvalidInputError,
    InvalidText,
    KalmError,
    ServiceUnavailableError,
    TransportError,
)
from kalm_integrations.protocol import EmbedRequest

Over = Callable[..., KalmClient]


def has_right_vectors(folder: Path, texts: list[str]) -> bool:
    parts = list(read(folder))
    assert [text for part in parts for text in part.texts] == texts
    return all(np.array_equal(part.vectors, vectors_of(part.texts)) for part in parts)


# --- damage


def finished(tmp_path: Path, over: Over) -> tuple[Path, Path]:
    source = corpus(tmp_path / "in.jsonl", *(f"text {n}" for n in range(10)))
    embed_corpus(source, tmp_path / "out", over(ScriptedTransport()), SMALL)
    return source, tmp_path / "out"


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGED: dict[str, Callable[[bytes], bytes]] = {"flipped": flipped, "cut": lambda c: c[:-10]}


@pytest.mark.parametrize("damage", [*DAMAGED, "missing"])
def test_damage_in_a_shard_is_detected(tmp_path: Path, over: Over, damage: str) -> None:
    source, out = finished(tmp_path, over)
    path = out / "shards/part-000001.parquet"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(DAMAGED[damage](path.read_bytes()))
    with pytest.raises(ConfigurationError, match=r"part-000001\.parquet"):
        list(read(out))
    with pytest.raises(ConfigurationError, match=r"part-000001\.parquet is missing or was changed"):
        embed_corpus(source, out, over(ScriptedTransport()), SMALL)


@pytest.mark.parametrize(
    "options",
    [
        {"vector_column": ""},
        {"vector_column": "a\udc00"},
        {"text_column": "a\udc00"},
        {"shard_rows": 0},
        {"on_error": "ignore"},
    ],
)
def test_options_that_no_job_can_have_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Options(**options)


JUNK: dict[str, Callable[[Path], object]] = {
    "NaN": lambda out: edit(out, seconds=math.nan),
    "a negative count": lambda out: edit(out, runs=-1),
    "rows without end": lambda out: edit(out, job=manifest_of(out)["job"] | {"rows": 10**30}),
    "a shard without a digest": lambda out: edit(
        out, shards=[shard | {"digest": ""} for shard in manifest_of(out)["shards"]]
    ),
    "no list": lambda out: edit(out, shards=7),
    "an unknown field": lambda out: edit(out, colour="red"),
    "shards of another job": lambda out: edit(out, shards=[]),
    "no JSON": lambda out: (out / "manifest.json").write_bytes(b"\xff{"),
    "a folder": lambda out: ((out / "manifest.json").unlink(), (out / "manifest.json").mkdir()),
    "an identity of nothing": lambda out: edit(out, job=manifest_of(out)["job"] | {"identity": {}}),
    "no manifest": lambda out: (out / "manifest.json").unlink(),
    "a shard that is a folder": lambda out: replace_by_folder(out / "shards/part-000000.parquet"),
}


def manifest_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "manifest.json").read_bytes()))


def edit(out: Path, **fields: Any) -> None:
    (out / "manifest.json").write_text(json.dumps(manifest_of(out) | fields))


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("junk", JUNK)
def test_junk_in_the_folder_is_an_error_that_names_it(
    tmp_path: Path, over: Over, junk: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = finished(tmp_path, over)
    JUNK[junk](out)
    transport = ScriptedTransport()
    with pytest.raises((KalmError, OSError), match=str(out)):
        embed_corpus(source, out, over(transport), SMALL)
    assert transport.requests == []
    with pytest.raises((KalmError, OSError)):
        list(read(out))


def test_other_files_in_the_folder_do_no_harm(tmp_path: Path, over: Over) -> None:
    source, out = finished(tmp_path, over)
    edit(out, complete=False, shards=manifest_of(out)["shards"][:1])
    (out / ".vectors").mkdir()
    for path in (".vectors/part-000001", ".vectors/recurring", ".rejected-000002.parquet", "notes"):
        (out / path).write_bytes(b"junk" * 1000)
    (out / "shards" / ".part-000001.parquet.tmp").write_bytes(b"half")
    embed_corpus(source, out, over(ScriptedTransport()), SMALL)
    assert has_right_vectors(out, [f"text {n}" for n in range(10)])


# --- cost


def test_nothing_is_paid_twice_after_a_failure_in_the_writer(tmp_path: Path, over: Over) -> None:
    source = corpus(tmp_path / "in.jsonl", *(f"text {n}" for n in range(10)))
    blocked = tmp_path / "out/shards/.part-000000.parquet.tmp"
    (blocked / "in the way").mkdir(parents=True)
    first = ScriptedTransport()
    with pytest.raises(OSError, match="part-000000"):
        embed_corpus(source, tmp_path / "out", over(first, batch_size=2), SMALL)
    (blocked / "in the way").rmdir()
    blocked.rmdir()
    second = ScriptedTransport()
    embed_corpus(source, tmp_path / "out", over(second, batch_size=2), SMALL)
    assert not set(first.sent) & set(second.sent)
    assert has_right_vectors(tmp_path / "out", [f"text {n}" for n in range(10)])


@pytest.mark.parametrize("kind", [TransportError, ServiceUnavailableError, ConfigurationError])
@pytest.mark.parametrize("poisoned", [{3}, {0, 1, 9}, {4, 5, 6, 7}])
def test_texts_that_make_the_service_fail_are_isolated(
    tmp_path: Path, over: Over, kind: type[KalmError], poisoned: set[int]
) -> None:
    texts = [f"poison {n}" if n in poisoned else f"text {n}" for n in range(10)]

    def refuse(request: EmbedRequest) -> None:
        if any("poison" in text for text in request.texts):
            raise kind("the engine choked.")

    source = corpus(tmp_path / "in.jsonl", *texts)
    client = over(ScriptedTransport(refuse=refuse), max_retries=0, batch_size=8)
    options = Options(shard_rows=16, on_error="skip")
    manifest = embed_corpus(source, tmp_path / "out", client, options)
    assert manifest.rejected == len(poisoned)
    assert has_right_vectors(tmp_path / "out", [t for t in texts if "poison" not in t])
    reasons = pq.read_table(tmp_path / "out/rejected.parquet")["reason"].to_pylist()
    assert all("the engine choked" in reason for reason in reasons)
    with pytest.raises(BadRowsError, match=rf"\(in\.jsonl line {min(poisoned) + 1}\) .*choked"):
        embed_corpus(source, tmp_path / "fail", client, Options(shard_rows=16))


def test_a_service_that_fails_for_every_text_rejects_none(tmp_path: Path, over: Over) -> None:
    def refuse(request: EmbedRequest) -> None:
        raise TransportError("the engine is gone.")

    source = corpus(tmp_path / "in.jsonl", *(f"text {n}" for n in range(10)))
    transport = ScriptedTransport(refuse=refuse)
    client = over(transport, max_concurrency=1)
    with pytest.raises(TransportError, match="the engine is gone"):
        embed_corpus(source, tmp_path / "out", client, Options(on_error="skip"))
    assert len(transport.requests) <= 3


# --- reuse


def test_only_new_texts_are_embedded_where_an_earlier_output_is_reused(
    tmp_path: Path, over: Over
) -> None:
    old = [f"text {n % 80}" for n in range(100)]
    embed_corpus(
        corpus(tmp_path / "a.jsonl", *old), tmp_path / "a", over(ScriptedTransport()), SMALL
    )
    new = ["changed", *old[1:40], "new", *old[60:], "new", "changed"]
    transport = ScriptedTransport()
    manifest = embed_corpus(
        corpus(tmp_path / "b.jsonl", *new),
        tmp_path / "b",
        over(transport),
        Options(shard_rows=7, reuse=(str(tmp_path / "a"),)),
    )
    assert sorted(transport.sent) == ["changed", "new"]
    assert manifest.reused == len(new) - 4
    assert has_right_vectors(tmp_path / "b", new)


def test_reuse_takes_no_null_vector_and_no_other_space(tmp_path: Path, over: Over) -> None:
    def refuse(request: EmbedRequest) -> None:
        bad = [InvalidText(n, "is odd") for n, text in enumerate(request.texts) if text == "odd"]
        if bad:
            raise InvalidInputError.of(bad)

    texts = ["a", "odd", "b"]
    source = corpus(tmp_path / "in.jsonl", *texts)
    client = over(ScriptedTransport(refuse=refuse))
    embed_corpus(source, tmp_path / "a", client, Options(on_error="null"))
    reuse = Options(reuse=(str(tmp_path / "a"),), shard_rows=2)
    transport = ScriptedTransport()
    embed_corpus(source, tmp_path / "b", over(transport), reuse)
    assert transport.sent == ["odd"]
    assert has_right_vectors(tmp_path / "b", texts)
    other = over(ScriptedTransport(), document_instruction="Other: {text}")
    with pytest.raises(IdentityMismatchError):
        embed_corpus(source, tmp_path / "c", other, reuse)
    for changed, name in (
        ({"vector_dtype": "float32"}, "vector_dtype"),
        ({"truncate": "end"}, "truncate"),
    ):
        with pytest.raises(ConfigurationError, match=f"--reuse .*{name}"):
            embed_corpus(source, tmp_path / "d", over(ScriptedTransport(), **changed), reuse)
    for folder in ("nothing", "in.jsonl"):
        with pytest.raises(ConfigurationError, match=f"--reuse .*{folder}"):
            embed_corpus(
                source,
                tmp_path / "e",
                over(ScriptedTransport()),
                Options(reuse=(str(tmp_path / folder),)),
            )


# --- limits


@pytest.mark.parametrize(
    "limit", [{"max_dollars": 1e-9, "dollars_per_second": 1.0}, {"max_hours": 1e-12}]
)
def test_a_limit_stops_at_a_finished_shard_and_a_higher_one_goes_on(
    tmp_path: Path, over: Over, limit: dict[str, float]
) -> None:
    texts = [f"text {n}" for n in range(20)]
    source, out = corpus(tmp_path / "in.jsonl", *texts), tmp_path / "out"
    stopped = embed_corpus(source, out, over(ScriptedTransport()), Options(shard_rows=4, **limit))
    assert not stopped.complete
    assert len(stopped.shards) == 1
    again = ScriptedTransport()
    embed_corpus(source, out, over(again), Options(shard_rows=4, **limit))
    assert again.sent == []
    higher = {
        name: 1e6 * value if name.startswith("max") else value for name, value in limit.items()
    }
    higher = {name: 1000.0 if name.startswith("max") else value for name, value in higher.items()}
    embed_corpus(source, out, over(ScriptedTransport()), Options(shard_rows=4, **higher))
    assert has_right_vectors(out, texts)


def test_the_command_says_how_to_go_on_after_a_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = corpus(tmp_path / "in.jsonl", *(f"text {n}" for n in range(20)))
    command = ["embed", str(source), "--output", str(tmp_path / "out"), "--backend", "local"]
    command += ["--shard-rows", "4", "--max-hours", "1e-9", "--json"]
    assert cli.main(command) == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out)["complete"] is False
    assert "4 of 20 rows are finished" in printed.err
    assert "--max-hours" in printed.err


def test_a_limit_in_dollars_needs_a_price(tmp_path: Path, over: Over) -> None:
    source = corpus(tmp_path / "in.jsonl", "a")
    with pytest.raises(ConfigurationError, match="--gpu"):
        embed_corpus(source, tmp_path / "out", over(ScriptedTransport()), Options(max_dollars=1.0))


# --- cut texts


def test_rows_that_were_cut_are_marked_and_counted(tmp_path: Path, over: Over) -> None:
    def refuse(request: EmbedRequest) -> None:
        long = [n for n, text in enumerate(request.texts) if text.startswith("long")]
        if long and request.truncate == "error":
            raise InputTooLongError.of([InvalidText(n, "is too long: 9,000 tokens") for n in long])

    texts = ["a", "long 1", "b", "long 1", "c", "x" * 300_000, "long 1"]
    source = corpus(tmp_path / "in.jsonl", *texts)
    transport = ScriptedTransport(refuse=refuse)
    client = over(transport, truncate="end")
    manifest = embed_corpus(source, tmp_path / "out", client, SMALL)
    marked = pq.read_table(tmp_path / "out/shards")["truncated"].to_pylist()
    assert marked == [text[:4] in ("long", "xxxx") for text in texts]
    assert manifest.truncated == 4
    reused = embed_corpus(
        source, tmp_path / "again", client, Options(reuse=(str(tmp_path / "out"),))
    )
    assert reused.truncated == 4
    embed_corpus(corpus(tmp_path / "b.jsonl", "a"), tmp_path / "b", over(ScriptedTransport()))
    assert "truncated" not in pq.read_table(tmp_path / "b/shards").column_names


def test_the_embedded_engine_s_cut_texts_are_marked(tmp_path: Path) -> None:
    texts = ["short", "many words " * 20_000]
    with KalmClient(backend="local", truncate="end") as client:
        manifest = embed_corpus(corpus(tmp_path / "in.jsonl", *texts), tmp_path / "out", client)
    assert pq.read_table(tmp_path / "out/shards")["truncated"].to_pylist() == [False, True]
    assert manifest.truncated == 1
    assert Manifest.read(tmp_path / "out") == manifest


# --- the command


def test_a_dry_run_needs_no_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KALM_BACKEND", "KALM_BASE_URL", "MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    source = corpus(tmp_path / "in.jsonl", "a", "a", "")
    assert cli.main(["embed", str(source), "--dry-run", "--gpu", "H100", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["rows"], printed["texts"], printed["copies"], printed["bad_rows"]) == (
        3,
        1,
        1,
        1,
    )


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["nothing.jsonl", "--output", "out"], 2),
        (["in.jsonl"], 2),
        (["in.jsonl", "--output", "out", "--max-dollars", "5"], 2),
        (["in.jsonl", "--output", "out", "--max-hours", "nan"], 2),
        (["in.jsonl", "--output", "in.jsonl"], 2),
        (["in.jsonl", "--output", "out", "--reuse", "out"], 2),
        (["in.jsonl", "--output", "out"], 0),
        (["--status", "out"], 2),
    ],
)
def test_json_is_one_document_in_every_case(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KALM_BACKEND", "local")
    corpus(tmp_path / "in.jsonl", "a")
    assert cli.main(["embed", *arguments, "--json"]) == status
    assert json.loads(capsys.readouterr().out).keys() >= ({"error"} if status else {"rows"})
