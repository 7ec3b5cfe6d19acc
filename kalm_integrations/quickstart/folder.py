"""The user's own corpus: the Markdown and text files of a folder, in pieces."""

from __future__ import annotations

import re
from itertools import islice, pairwise
from pathlib import Path
from typing import Final

from kalm_integrations.documents import SUFFIXES, files, left_out, unread
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.quickstart.corpus import Corpus, Question, Text

CHUNK: Final = 1000  # characters
OVERLAP: Final = 100
MOST_CHUNKS: Final = 20_000
"""Qdrant in memory is not made for more, and they take the embedded engine many minutes."""

_QUESTIONS: Final = 3
_LONGEST: Final = 100  # characters of a heading
_FENCED = re.compile(r"^(```|~~~).*?(^\1|\Z)", re.MULTILINE | re.DOTALL)
_HASHES = re.compile(r"#{1,6}[ \t]")
_UNDERLINE = re.compile(r"([=~^\"*+#-])\1{2,}")
_MARKUP = re.compile(r"`|\*\*|__")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")


def read(folder: Path) -> Corpus:
    """The pieces of all documents in `folder`, with their own headings as questions.

    Raises:
        ConfigurationError: It is no folder, or has nothing to index, or too much.
    """
    documents, texts, origin = _pieces(folder)
    if len(texts) > MOST_CHUNKS:
        raise ConfigurationError(
            f"{folder} has {len(texts):,} pieces of text, and more than {MOST_CHUNKS:,} take too "
            "long for a quickstart: name a smaller folder"
        )
    return Corpus(
        texts,
        origin,
        [Question(text) for text in _spread(documents) or [texts[0].content[:_LONGEST]]],
        "headings of these files, to show something; ask your own",
    )


def pieces(folder: Path) -> tuple[list[Text], str]:
    """The pieces of all documents in `folder`, however many, and what they are, for the user.

    Raises:
        ConfigurationError: It is no folder, or has no text.
    """
    _, texts, origin = _pieces(folder)
    return texts, origin


def _pieces(folder: Path) -> tuple[dict[str, str], list[Text], str]:
    if folder.is_file():
        raise ConfigurationError(f"{folder} is a file: name the folder that it is in")
    if not folder.is_dir():
        raise ConfigurationError(f"there is no folder {folder}")
    documents, skipped = _documents(folder)
    unread_ones = left_out(skipped)
    texts = _split(documents)
    if not texts:
        raise ConfigurationError(
            f"{folder} has no text in files named {', '.join('*' + end for end in SUFFIXES)}"
            + unread_ones
        )
    origin = f"{len(texts):,} pieces of {len(documents):,} files in {folder}{unread_ones}"
    return documents, texts, origin


def _documents(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Texts by file name, and for each file that could not be read, which and why."""
    documents: dict[str, str] = {}
    skipped: list[str] = []
    for path in files(folder):
        name = path.relative_to(folder).as_posix()
        try:
            documents[name] = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            skipped.append(unread(name, error))
    return documents, skipped


def _split(documents: dict[str, str]) -> list[Text]:
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    splitter = RecursiveCharacterTextSplitter(chunk_size=CHUNK, chunk_overlap=OVERLAP)
    return [
        Text(name, chunk)
        for name, document in documents.items()
        for chunk in splitter.split_text(document)
    ]


def _spread(documents: dict[str, str]) -> list[str]:
    """Up to three headings from all over the folder: of different files, if there are enough."""
    by_file = [found for found in map(_headings, documents.values()) if found]
    headings = list(dict.fromkeys(found[0] for found in by_file))
    if len(headings) < _QUESTIONS:
        headings = list(dict.fromkeys(heading for found in by_file for heading in found))
    count = min(_QUESTIONS, len(headings))
    return [headings[place * len(headings) // count] for place in range(count)]


def _headings(document: str) -> list[str]:
    """The document's headings in plain words, or else its first line in words."""
    lines = _FENCED.sub("", document).splitlines()
    hashed = filter(_HASHES.match, lines)
    underlined = (above for above, line in pairwise(lines) if _UNDERLINE.fullmatch(line.rstrip()))
    first = islice(filter(_plain, document.splitlines()), 1)
    found = (
        [plain for plain in map(_plain, kind) if plain] for kind in (hashed, underlined, first)
    )
    return next(filter(None, found), [])


def _plain(line: str) -> str:
    """The beginning of `line` without markup; nothing of a line without words."""
    plain = _MARKUP.sub("", _LINK.sub(r"\1", line[:_LONGEST])).strip(" \t#")
    return plain if re.search(r"\w", plain) else ""
