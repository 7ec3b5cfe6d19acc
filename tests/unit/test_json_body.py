"""Bodies are parsed as the standard library would, and refused if they have too many values."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_integrations.errors import (
    ConfigurationError,
    InvalidArgumentError,
    KalmError,
    RequestTooLargeError,
)
from modal_backend.http.json_body import parse

texts = st.text(st.characters(exclude_categories=()))  # lone surrogates, too
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@given(values, st.booleans(), st.sampled_from([None, 2]))
def test_any_json_value_is_parsed(value: Any, ascii_only: bool, indent: int | None) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert parse(body.encode(errors="surrogatepass")) == value


@given(st.text('"\\[]{},:a1 \n', max_size=60))
def test_invalid_json_is_refused(body: str) -> None:
    try:
        expected = json.loads(body)
    except ValueError:
        with pytest.raises(ConfigurationError, match="not JSON"):
            parse(body.encode())
    else:
        assert parse(body.encode()) == expected


@pytest.mark.parametrize(
    "body",
    [
        b'{"input":["a"' + b',"a"' * 5_000 + b"]}",
        b'{"input":["a"' + b',"\\\\"' * 5_000 + b"]}",
        b'{"input":["a"' + b',"\\""' * 5_000 + b"]}",
        b'{"input":[[]' + b",[]" * 20_000 + b"]}",
        b'{"input":[{}' + b",{}" * 20_000 + b"]}",
        b'{"input":[null' + b",null" * 20_000 + b"]}",
        b'{"input":"a"' + b',"f":1' * 20_000 + b"}",
        b"[" * 100_000,
        b'{"input":' + b"1" * 100_000 + b"}",
        b'"' * 100_000,
    ],
    ids=lambda body: body[:24].decode(),
)
def test_too_many_values_are_refused_before_parsing(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("modal_backend.http.json_body.orjson.loads")
    with pytest.raises(RequestTooLargeError):
        parse(body)


@pytest.mark.parametrize("ids", [b"[1%b]", b"[[1%b],[2]]", b"[-1%b]"])
def test_many_token_ids_get_their_own_error(ids: bytes) -> None:
    body = b'{"model": "m", "input": %b}' % (ids % (b", 1" * 20_000))
    with pytest.raises(InvalidArgumentError, match="token ids"):
        parse(body)


def test_structure_within_texts_counts_as_text() -> None:
    text = '{"[,:]}\\"' * 10_000
    assert parse(json.dumps({"input": [text, "\ud800"]}).encode()) == {"input": [text, "\ud800"]}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b'"\xff"',
        '{"input":"a"}'.encode("utf-16"),
        b"[" * 5_000 + b"]" * 5_000,
        b'{"a":' * 3_000 + b"1" + b"}" * 3_000,
        b"9" * 5_000,
        b'"' + b"a" * 4_000_000 + b'\\ud800"',
    ],
    ids=lambda body: repr(body[:9]),
)
def test_unusual_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(KalmError) as caught:
        parse(body)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 500


def test_a_byte_order_mark_is_ignored() -> None:
    assert parse(b'\xef\xbb\xbf{"input":"a"}') == {"input": "a"}
