"""docs/bad-input.md on the real embedded engine and through both adapters.

A row says what is embedded as it is and what is refused. A refusal names the index, comes before
anything is sent, and leaves the other texts within reach.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import ScriptedTransport

from kalm_integrations import KalmClient, KalmModalEmbeddings, llama_index
from kalm_integrations.errors import InputTooLongError, InvalidArgumentError, InvalidInputError
from kalm_integrations.validation import MAX_CHARACTERS

DOCUMENT = Path(__file__).parents[2] / "docs" / "bad-input.md"
MEGABYTE = "A megabyte of text. " * 52_429

# Row in docs/bad-input.md → (text, what its error says).
REFUSED = {
    "`None`": (None, r"texts\[1\] is None, not a string"),
    "bytes": (b"abc", r"texts\[1\] is bytes, not a string: decode it first"),
    "a number": (3.14, r"texts\[1\] is of type float, not a string"),
    "token ids": ([17, 4], r"texts\[1\] is a list, not a string \(token ids are not accepted\)"),
    "empty string": ("", r"texts\[1\] is empty"),
    "white space only": (" \n\t ", r"texts\[1\] is white space only"),
    "lone surrogate": ("caf\udce9", r"texts\[1\] has a lone surrogate at character 3"),
    "over 262,144 characters": (MEGABYTE, r"texts\[1\] is too long: 1,048,580 characters"),
    "over the model's length": (
        "word " * 20_000,
        r"texts\[1\] is too long: about \d\d,\d{3} tokens",
    ),
}
EMBEDDED_AS_IS = {
    "control characters": "bell \x07, escape \x1b[0m, NUL \x00",
    "`<bos>` and the like": "<bos>What does <eos> do?<start_of_turn>",
    "newlines, runs of spaces": "  two\n\nparagraphs   here ",
    "one character": "x",
    "emoji, combining characters": "👩‍👩‍👧 e\u0301 ﷽",
    "zero-width characters": "\u200b\u2060",
}
WRONG_ARGUMENTS = {
    "a bare string": ("text", "texts is one str, not a list of texts"),
    "bare bytes": (b"text", "texts is one bytes, not a list of texts"),
    "a set": ({"a", "b"}, "texts is a set, whose order is not that of the vectors"),
    "a dict": ({"a": 1}, "texts is a dict, whose order is not that of the vectors"),
    "a number as the list": (7, "texts is of type int, not a list of texts"),
    "`None` as the list": (None, "texts is None, not a list of texts"),
}

client = KalmClient(backend="local")


def _alone(text: str) -> np.ndarray[Any, Any]:
    return client.embed([text]).vectors[0]


@pytest.mark.parametrize("row", REFUSED)
class TestRefused:
    def test_invalid_texts_are_named_by_index_and_others_can_be_embedded(self, row: str) -> None:
        text, message = REFUSED[row]
        texts: list[Any] = ["first", text, "last"]
        with pytest.raises(InvalidInputError, match=message) as caught:
            client.embed(texts)
        assert [bad.index for bad in caught.value.invalid] == [1]
        too_long = "too long" in message
        assert isinstance(caught.value, InputTooLongError) == too_long

        parts = list(client.iter_embed(texts, on_error="skip"))
        assert [bad.index for part in parts for bad in part.rejected] == [1]
        got = {index: vector for part in parts for index, vector in part}
        assert sorted(got) == [0, 2]
        assert np.allclose(got[2], _alone("last"), atol=1e-3)

    def test_the_same_through_the_adapters_sync_and_async(self, row: str) -> None:
        text, message = REFUSED[row]
        texts: list[Any] = ["first", text, "last"]
        langchain = KalmModalEmbeddings(backend="local")
        index = llama_index.KalmModalEmbeddings(backend="local")
        calls: list[Callable[[], object]] = [
            lambda: langchain.embed_documents(texts),
            lambda: asyncio.run(langchain.aembed_documents(texts)),
            lambda: index.get_text_embedding_batch(texts),
            lambda: asyncio.run(index.aget_text_embedding_batch(texts)),
        ]
        for call in calls:
            with pytest.raises(InvalidInputError, match=message):
                call()
        with pytest.raises(InvalidInputError, match=message.replace(r"\[1\]", r"\[0\]")):
            langchain.embed_query(text)  # type: ignore[arg-type]


# Only the engine's tokenizer knows the length in tokens.
@pytest.mark.parametrize("row", [row for row in REFUSED if row != "over the model's length"])
def test_nothing_is_sent(row: str, over: Callable[..., KalmClient]) -> None:
    transport = ScriptedTransport()
    with pytest.raises(InvalidInputError):
        over(transport, batch_size=1).embed(["first", REFUSED[row][0], "last"])
    assert transport.requests == []


@pytest.mark.parametrize("row", EMBEDDED_AS_IS)
def test_embedded_as_it_is(row: str, over: Callable[..., KalmClient]) -> None:
    text = EMBEDDED_AS_IS[row]
    vector = _alone(text)
    assert np.isclose(np.linalg.norm(vector), 1, atol=1e-3)
    transport = ScriptedTransport()
    over(transport).embed([text])
    assert transport.sent == [text]


@pytest.mark.parametrize("row", WRONG_ARGUMENTS)
def test_an_argument_that_is_not_a_list_of_texts_is_refused(row: str) -> None:
    argument, message = WRONG_ARGUMENTS[row]
    for call in (client.embed, client.iter_embed, client.aiter_embed):
        with pytest.raises(InvalidArgumentError, match=message):
            call(argument)  # type: ignore[arg-type]


def test_truncate_end_embeds_the_beginning_of_a_long_text() -> None:
    cutting = KalmClient(backend="local", truncate="end")
    beginning = "word " * 5_000
    long, longer, short = cutting.embed(
        [beginning * 3 + "zebra " * 9, beginning * 4, "zebra"]
    ).vectors
    assert np.allclose(long, longer, atol=1e-3)  # what follows the limit plays no part
    assert not np.allclose(long, short, atol=1e-1)
    assert len(MEGABYTE) > MAX_CHARACTERS
    assert cutting.embed([MEGABYTE]).usage.tokens == 8192


def test_no_texts_give_no_vectors() -> None:
    assert client.embed([]).vectors.shape == (0, 512)
    assert KalmModalEmbeddings(backend="local").embed_documents([]) == []


def test_the_table_in_the_docs_has_these_rows_and_no_others() -> None:
    documented = re.findall(r"^\| (.+?) +\|", DOCUMENT.read_text(), re.MULTILINE)
    assert {row for row in documented if row != "input"} == REFUSED.keys()
