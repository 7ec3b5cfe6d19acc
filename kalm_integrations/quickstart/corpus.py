"""What the quickstart indexes, asks and finds."""

from __future__ import annotations

from typing import NamedTuple


class Text(NamedTuple):
    """One text to find: the name that a hit shows, and what is embedded."""

    name: str
    content: str


class Hit(NamedTuple):
    """A text that was found, as the framework returns it."""

    name: str
    content: str
    score: float


class Question(NamedTuple):
    """A question, the names of the texts that answer it if they are known, and its meaning."""

    text: str
    expected: frozenset[str] = frozenset()
    meaning: str = ""  # in English, where the question is in another language


class Corpus(NamedTuple):
    """Texts, and at least one question; `origin` and `asker` tell the user where they are from."""

    texts: list[Text]
    source: str  # the folder's path; identifies the corpus
    origin: str
    questions: list[Question]
    asker: str
