"""What the quickstart indexes, and what it asks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """One text to find: what a hit is called, and what is embedded."""

    name: str
    content: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and the names of the texts that answer it; none where nobody knows them.

    `meaning` is the question in English, where it is in another language.
    """

    text: str
    expected: frozenset[str] = frozenset()
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts, and questions to them.

    Attributes:
        texts: In the order in which they are indexed.
        origin: What they are, for the user.
        questions: At least one.
        asker: Where the questions are from, for the user.
    """

    texts: list[Text]
    origin: str
    questions: list[Question]
    asker: str
