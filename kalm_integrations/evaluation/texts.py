"""The user's own texts: where each one is, which of them are taken, and what is asked.

Every text keeps its place in the user's file, by which reports and errors name it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.errors import ConfigurationError, InvalidText
from kalm_integrations.lines import column_of, is_json_lines, lines_of
from kalm_integrations.protocol import Truncate
from kalm_integrations.validation import why_invalid

if TYPE_CHECKING:
    from kalm_integrations.quickstart.corpus import Text

MOST_DERIVED: Final = 500
"""Queries that are made of documents, where the user has none."""

_PLAIN: Final = (".txt", "")
_SHOWN: Final = 5  # texts that cannot be embedded
_SEED: Final = 0
# To the first mark that ends a sentence, not within the first words ("e.g. this"), or the line.
_FIRST_SENTENCE: Final = re.compile(r"\s*(.{20,300}?(?:[.!?](?=\s)|[。！？])|.{1,300})")


@dataclass(frozen=True, slots=True)
class Texts:
    """Different texts, in the order of the user's file.

    Attributes:
        texts: What is embedded.
        places: Of each, where it is.
        origin: What they are, for the user.
        found: Texts that there were, less copies.
        copies: Texts that were there before, word by word, and are left out.
    """

    texts: list[str]
    places: list[str]
    origin: str
    found: int
    copies: int

    def __len__(self) -> int:
        return len(self.texts)

    def sampled(self, most: int) -> Texts:
        """At most so many, drawn by lot, always the same ones, in the same order."""
        if len(self) <= most:
            return self
        drawn = np.random.default_rng(_SEED).choice(len(self), most, replace=False)
        rows = np.sort(drawn).tolist()
        texts, places = ([column[row] for row in rows] for column in (self.texts, self.places))
        return Texts(texts, places, self.origin, self.found, self.copies)

    def refuse(self, invalid: Iterable[InvalidText]) -> ConfigurationError:
        """The error that names texts by their places."""
        return _refusal([f"{self.places[bad.index]} {bad.reason}" for bad in invalid])


def read(path: Path, column: str | None, truncate: Truncate) -> Texts:
    """The texts of a file or folder.

    Args:
        path: JSON Lines (.jsonl, .ndjson), plain text with one text a line (.txt or no suffix;
            blank lines are skipped), or a folder of documents, which is read in pieces.
        column: Of JSON Lines, the field that is the text; None is `TEXT_COLUMN`.
        truncate: Whether texts may be cut; else those that no model takes are refused.

    Raises:
        ConfigurationError: It cannot be read, or has a text that cannot be embedded, or none.
        ImportError: A folder, and the extra "quickstart" is not installed.
    """
    if path.is_dir():
        from kalm_integrations.quickstart import folder

        pieces, origin = folder.pieces(path)
        return _distinct(_numbered(pieces), origin, truncate)
    if is_json_lines(path):
        return _distinct(column_of(path, column), str(path), truncate)
    if path.suffix.lower() not in _PLAIN:
        raise ConfigurationError(
            f"{path} is neither a folder, nor JSON Lines (*.jsonl), nor plain text with one text "
            "a line (*.txt)."
        )
    return _distinct(lines_of(path), str(path), truncate)


def derived(documents: Texts) -> tuple[Texts, NDArray[np.int64]]:
    """First sentences of some documents, to ask where there are no queries.

    Returns:
        The queries, and the document that each was taken from.
    """
    some = documents.sampled(MOST_DERIVED)
    row_of = {text: row for row, text in enumerate(documents.texts)}
    taken = {_first_sentence(text): text for text in reversed(some.texts)}  # the first one wins
    pairs = sorted((row_of[text], query) for query, text in taken.items())
    rows = [row for row, _ in pairs]
    places = [documents.places[row] for row in rows]
    queries = Texts([query for _, query in pairs], places, "", len(pairs), 0)
    return queries, np.array(rows, dtype=np.int64)


def _first_sentence(text: str) -> str:
    found = _FIRST_SENTENCE.match(text)
    return found[1] if found else text


def _distinct(named: Iterable[tuple[str, str]], origin: str, truncate: Truncate) -> Texts:
    places: dict[str, str] = {}
    refused: list[str] = []
    total = 0
    for place, text in named:
        if reason := why_invalid(text, truncate):
            refused.append(f"{place} {reason}")
            continue
        total += 1
        places.setdefault(text, place)
    if refused:
        raise _refusal(refused)
    if not places:
        raise ConfigurationError(f"{origin} has no text.")
    return Texts([*places], [*places.values()], origin, len(places), total - len(places))


def _refusal(refused: list[str]) -> ConfigurationError:
    more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
    return ConfigurationError(
        f"{'; '.join(refused[:_SHOWN])}{more}. Mend or leave out what cannot be embedded; "
        "KALM_TRUNCATE=end cuts what is too long."
    )


def _numbered(pieces: Iterable[Text]) -> Iterator[tuple[str, str]]:
    """Pieces of documents, each with its document and its number there."""
    for name, of_one in groupby(pieces, key=lambda piece: piece.name):
        for number, piece in enumerate(of_one, 1):
            yield f"{name} (piece {number})", piece.content
