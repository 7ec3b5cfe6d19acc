"""How many tokens there are to embed: counted in files as the client estimates them, or told."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kalm_integrations.batching import estimate_tokens
from kalm_integrations.documents import SUFFIXES, files, left_out, unread
from kalm_integrations.errors import ConfigurationError

_PIECE: Final = 2**20  # bytes that are read at a time: a corpus may be larger than the memory


@dataclass(frozen=True, slots=True)
class Corpus:
    """What is to be embedded.

    Attributes:
        tokens: All of them.
        origin: Where that number is from.
    """

    tokens: float
    origin: str


def of_tokens(tokens: int) -> Corpus:
    """As told."""
    return Corpus(tokens, "as you say")


def of_texts(texts: int, tokens_per_text: int) -> Corpus:
    """As told, in two numbers."""
    return Corpus(texts * tokens_per_text, f"{texts:,} texts of {tokens_per_text:,}")


def of_files(path: Path) -> Corpus:
    """Estimated from a file, or from the documents of a folder. Overlapping chunks are more.

    Raises:
        ConfigurationError: There is no text.
    """
    path = path.expanduser()
    if not path.exists():
        raise ConfigurationError(f"--corpus: there is no {path}.")
    sizes: list[int] = []
    skipped: list[str] = []
    for file in [path] if path.is_file() else files(path):
        try:
            sizes.append(sum(_sizes(file)))
        except (OSError, UnicodeDecodeError) as error:
            skipped.append(unread(file.name, error))
    if not sum(sizes):
        kinds = "" if path.is_file() else f" in files named {', '.join('*' + s for s in SUFFIXES)}"
        raise ConfigurationError(
            f"--corpus: {path} has no text{kinds}{left_out(skipped)}. Of anything else, give "
            "--texts and --tokens-per-text."
        )
    tokens = sum(map(estimate_tokens, filter(None, sizes)))
    named = "1 file" if len(sizes) == 1 else f"{len(sizes):,} files"
    return Corpus(tokens, f"estimated, 4 bytes a token, {named} of {path}{left_out(skipped)}")


def _sizes(file: Path) -> Iterator[int]:
    """The file's bytes, piece by piece.

    Raises:
        UnicodeDecodeError: It is no text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE):
            decoder.decode(piece)
            yield len(piece)
    decoder.decode(b"", final=True)
