"""The user's own corpus: the Markdown and text files of a folder, in pieces."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Final

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.quickstart.corpus import Corpus, Question, Text
from kalm_integrations.readers.files import DOCUMENTS, LINES

MOST_CHUNKS: Final = 20_000
"""Qdrant in memory is not made for more, and they take the embedded engine many minutes."""
_SUFFIXES: Final = (*DOCUMENTS, *LINES)
_NOT_DOCUMENTS: Final = {"node_modules", "site-packages", "venv", "__pycache__"}
_MOST_NAMES: Final = 5  # of files that could not be read
_CHUNK: Final = 1000  # characters
_OVERLAP: Final = 100
_QUESTIONS: Final = 3
_LONGEST: Final = 100  # characters of a heading
_FENCED = re.compile(r"^(```|~~~).*?(^\1|\Z)", re.MULTILINE | re.DOTALL)
_UNDERLINE = re.compile(r"([=~^\"*+#-])\1{2,}")
_MARKUP = re.compile(r"`|\*\*|__|!?\[(?P<text>[^\]]*)\]\([^)]*\)")


def read(folder: Path) -> Corpus:
    """The pieces of all documents in `folder`, with their own headings as questions.

    Raises:
        ConfigurationError: It is not a folder, or has nothing to index, or too much.
    """
    texts, origin = pieces(folder)
    if len(texts) > MOST_CHUNKS:
        raise ConfigurationError(
            f"{folder} has {len(texts):,} pieces of text, and more than {MOST_CHUNKS:,} take too "
            "long for a quickstart: name a smaller folder"
        )
    by_file = list(filter(None, map(_headings, _documents(folder)[0].values())))
    headings = list(dict.fromkeys(found[0] for found in by_file))  # of different files, if possible
    if len(headings) < _QUESTIONS:
        headings = list(dict.fromkeys(heading for found in by_file for heading in found))
    headings = headings or [texts[0].content[:_LONGEST]]
    count = min(_QUESTIONS, len(headings))
    questions = [Question(headings[place * len(headings) // count]) for place in range(count)]
    asker = "headings of these files, to show something; ask your own"
    return Corpus(texts, str(folder.resolve()), origin, questions, asker)


def pieces(folder: Path) -> tuple[list[Text], str]:
    """The pieces of all documents in `folder`, and what they are, for the user.

    Raises:
        ConfigurationError: It is not a folder, or has no text.
    """
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    if not folder.is_dir():
        message = "is a file: name the folder that it is in" if folder.is_file() else "is missing"
        raise ConfigurationError(f"{folder} {message}")
    documents, skipped = _documents(folder)
    splitter = RecursiveCharacterTextSplitter(chunk_size=_CHUNK, chunk_overlap=_OVERLAP)
    texts = [
        Text(name, chunk)
        for name, document in documents.items()
        for chunk in splitter.split_text(document)
    ]
    if not texts:
        kinds = ", ".join(f"*{suffix}" for suffix in _SUFFIXES)
        raise ConfigurationError(f"{folder} has no text in files named {kinds}{_left_out(skipped)}")
    origin = f"{len(texts):,} pieces of {len(documents):,} files in {folder}{_left_out(skipped)}"
    return texts, origin


def _documents(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Texts by file name, and what was left out and why."""
    documents: dict[str, str] = {}
    skipped: list[str] = []
    for path in _files(folder, _SUFFIXES):
        name = path.relative_to(folder).as_posix()
        try:
            documents[name] = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            skipped.append(f"{name} ({reason})")
    kinds = Counter(path.suffix.lower() or "no suffix" for path in _files(folder, ("",)))
    others = [f"{count:,} × {kind}" for kind, count in kinds.items() if kind not in _SUFFIXES]
    return documents, skipped + others


def _files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files that are neither hidden nor installed, in order of their names, folder by folder."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(n for n in folders if n[0] != "." and n not in _NOT_DOCUMENTS)
        for name in sorted(names):
            path = Path(parent, name)
            # opening a named pipe would block
            if name.lower().endswith(suffixes) and name[0] != "." and path.is_file():
                yield path


def _left_out(skipped: list[str]) -> str:
    """The end of a message: which files were not read, and why."""
    more = len(skipped) - _MOST_NAMES
    names = [*skipped[:_MOST_NAMES], f"{more} more"] if more > 0 else skipped
    return f"; left out: {', '.join(names)}" if names else ""


def _headings(document: str) -> list[str]:
    """The document's headings in plain words, or else its first line in words."""
    lines = _FENCED.sub("", document).splitlines()
    hashed = [line for line in lines if re.match(r"#{1,6}[ \t]", line)]
    underlined = [line for line, next_ in pairwise(lines) if _UNDERLINE.fullmatch(next_.rstrip())]
    for kind in (hashed, underlined, document.splitlines()):
        plain = [text for text in map(_plain, kind) if text]
        if plain:
            return plain[:1] if kind not in (hashed, underlined) else plain
    return []


def _plain(line: str) -> str:
    """The beginning of `line` without markup; nothing of a line without words."""
    plain = _MARKUP.sub(lambda markup: markup["text"] or "", line[:_LONGEST]).strip(" \t#")
    return plain if re.search(r"\w", plain) else ""
