"""The user's texts: each keeps its place, and whatever is wrong is named by it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_integrations.errors import ConfigurationError, InvalidText
from kalm_integrations.evaluation.texts import MOST_DERIVED, Texts, derived, read

LINE = st.text(min_size=1).filter(lambda line: len(f"{line}x".splitlines()) == 1 and line.strip())


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, column: str | None = None, truncate: str = "error") -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(path, column, truncate)  # type: ignore[arg-type]
    return str(caught.value)


def of(*texts: str) -> Texts:
    return Texts([*texts], [f"place {n}" for n in range(len(texts))], "", len(texts), 0)


# --- files


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "queries"])
def test_plain_text_has_one_text_a_line(tmp_path: Path, name: str) -> None:
    found = read(written(tmp_path, name, "\ufeff one \r\n\n  \ntwo\n one \nthree"), None, "error")
    assert found.texts == [" one ", "two", "three"]
    assert found.places == [f"{name} line 1", f"{name} line 4", f"{name} line 6"]
    assert (found.found, found.copies, len(found)) == (3, 1, 3)
    assert found.origin == str(tmp_path / name)


@pytest.mark.parametrize("column", [None, "body"])
def test_json_lines_have_a_column(tmp_path: Path, column: str | None) -> None:
    lines = [json.dumps({"id": n, column or "text": text}) for n, text in enumerate("aba")]
    path = written(tmp_path, "a.jsonl", "\n\n".join(lines))
    found = read(path, column, "error")
    assert (found.texts, found.places) == (["a", "b"], ["a.jsonl line 1", "a.jsonl line 3"])
    assert (found.found, found.copies) == (2, 1)


def test_a_folder_is_read_in_pieces(tmp_path: Path) -> None:
    long = "\n\n".join(f"{word} " * 150 for word in ("one", "two"))
    written(tmp_path, "long.md", long)
    written(tmp_path, "short.txt", "three")
    written(tmp_path, "latin.txt", b"caf\xe9")
    found = read(tmp_path, None, "error")
    assert found.places == ["long.md (piece 1)", "long.md (piece 2)", "short.txt (piece 1)"]
    assert found.texts[2] == "three"
    assert "left out: latin.txt (not UTF-8)" in found.origin


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"fine\ncaf\xe9\n", "a.txt line 2 is not UTF-8: byte 0xe9 at position 3"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl line 1 is not UTF-8"),
        ("a.txt", "", "a.txt has no text"),
        ("a.txt", " \n\n", "a.txt has no text"),
        ("a.jsonl", "", "a.jsonl has no text"),
        ("a.jsonl", '{"text": "x"}\n{"text"', "a.jsonl line 2 is not JSON: Expecting ':'"),
        ("a.jsonl", "[" * 200_000, "a.jsonl line 1 is not JSON"),
        ("a.jsonl", '["text"]', "a.jsonl line 1 is no JSON object, but list"),
        ("a.jsonl", '{"id": 1, "body": ""}', "line 1 has no 'text', but 'id', 'body': --text-col"),
        ("a.jsonl", "{}", "line 1 has no 'text', but nothing"),
        ("a.jsonl", '{"text": ""}', "a.jsonl line 1 is empty. Mend or leave out"),
        ("a.jsonl", '{"text": null}', "a.jsonl line 1 is None, not a string"),
        ("a.jsonl", '{"text": [1]}', "a.jsonl line 1 is a list, not a string"),
        ("a.jsonl", '{"text": {}}', "a.jsonl line 1 is of type dict, not a string"),
        ("a.jsonl", '{"text": "\\ud800"}', "a.jsonl line 1 has a lone surrogate"),
        ("a.jsonl", '{"text": ""}\n' * 7, "a.jsonl line 5 is empty; and 2 more."),
        ("a.txt", "x" * 300_000, "line 1 is too long: 300,000 characters"),
        ("a.csv", "text\nx", "a.csv is neither a folder, nor JSON Lines"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    assert said in refused(written(tmp_path, name, content))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "missing.txt: No such file" in refused(tmp_path / "missing.txt")
    assert "has no text in files named" in refused(tmp_path)


def test_a_text_that_may_be_cut_may_be_long(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "x" * 300_000)
    assert len(read(path, None, "end")) == 1
    assert "KALM_TRUNCATE=end cuts what is too long" in refused(path)


@given(lines=st.lists(LINE, min_size=1))
def test_every_text_is_where_its_place_says(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    path = tmp_path_factory.mktemp("texts") / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    found = read(path, None, "error")
    assert found.texts == list(dict.fromkeys(lines))
    for text, place in zip(found.texts, found.places, strict=True):
        assert lines[int(place.rpartition(" ")[2]) - 1] == text
        assert lines.index(text) == int(place.rpartition(" ")[2]) - 1


# --- samples


@given(st.integers(1, 30), st.integers(1, 40))
def test_a_sample_is_always_the_same_and_in_order(count: int, most: int) -> None:
    texts = of(*map(str, range(count)))
    sample = texts.sampled(most)
    assert sample == of(*map(str, range(count))).sampled(most)
    assert len({*sample.texts}) == len(sample) == min(most, count)
    assert sample.texts == sorted(sample.texts, key=int)
    assert sample.places == [f"place {text}" for text in sample.texts]
    assert sample.found == count


def test_a_sample_is_of_the_whole_corpus() -> None:
    sample = of(*map(str, range(10_000))).sampled(2000)
    assert 4700 < np.mean([*map(int, sample.texts)]) < 5300


def test_a_refused_text_is_named_by_its_place() -> None:
    sample = of(*"abcdefghij").sampled(3)
    error = sample.refuse([InvalidText(2, "is too long: 9 tokens")])
    assert f"{sample.places[2]} is too long: 9 tokens. Mend" in str(error)
    assert sample.places[2] != "place 2"


# --- queries made of documents


NILE = "尼罗河是非洲最长的河流，流经十一个国家，最后注入地中海。"


@pytest.mark.parametrize(
    ("query", "rest"),
    [
        ("How high is the mountain?", " It is high."),
        ("Use it, e.g. this one, for 3.5 minutes.", " Then stop."),
        ("# A heading", "\n\nAnd its text."),
        ("no end", ""),
        (NILE, "它很长。"),
        ("x" * 300, "x" * 700),
    ],
)
def test_a_first_sentence(query: str, rest: str) -> None:
    queries, own = derived(of(f"\n  {query}{rest}"))
    assert (queries.texts, own.tolist()) == ([query], [0])


@given(st.lists(LINE, min_size=1, max_size=20, unique=True))
def test_each_query_is_of_its_own_document(texts: list[str]) -> None:
    documents = of(*texts)
    queries, own = derived(documents)
    assert len({*queries.texts}) == len(queries) == len(own)
    for query, place, row in zip(queries.texts, queries.places, own, strict=True):
        assert documents.texts[row].lstrip().startswith(query)
        assert place == documents.places[row]
        assert query
        assert not query.isspace()


def test_documents_that_begin_alike_are_asked_for_once() -> None:
    queries, own = derived(of("Same.\nOne", "Other.\nTwo", "Same.\nThree"))
    assert (queries.texts, own.tolist()) == (["Same.", "Other."], [0, 1])


def test_there_are_not_too_many_queries() -> None:
    queries, own = derived(of(*(f"text {n}" for n in range(3000))))
    assert len(queries) == MOST_DERIVED
    assert [f"text {row}" for row in own] == queries.texts
