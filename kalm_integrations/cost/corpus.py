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
from kalm_integrations.lines import TEXT_COLUMN, column_of, is_json_lines

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


def of_files(path: Path, column: str | None = None) -> Corpus:
    """Estimated from a file, or from the documents of a folder. Overlapping chunks are more.

    Args:
        path: JSON Lines, any other text file, or a folder.
        column: Of JSON Lines, the field that is the text; None is `TEXT_COLUMN`.

    Raises:
        ConfigurationError: There is no text.
    """
    if is_json_lines(path):
        return _of_json_lines(path, column or TEXT_COLUMN)
    if path.suffix.lower() == ".parquet":
        raise ConfigurationError(
            f"--corpus: {path} is counted by `kalm embed {path} --dry-run --gpu GPU`, row by row."
        )
    folder = path.is_dir()  # what is neither that nor a file can be read too: a pipe
    sizes: list[int] = []
    skipped: list[str] = []
    for file in files(path) if folder else [path]:
        try:
            sizes.append(sum(_sizes(file)))
        except (OSError, UnicodeDecodeError) as error:
            skipped.append(unread(file.name, error))
    if not sum(sizes):
        kinds = f" in files named {', '.join('*' + s for s in SUFFIXES)}" if folder else ""
        raise ConfigurationError(
            f"--corpus: {path} has no text{kinds}{left_out(skipped)}. Of anything else, give "
            "--texts and --tokens-per-text."
        )
    tokens = sum(map(estimate_tokens, filter(None, sizes)))
    named = "1 file" if len(sizes) == 1 else f"{len(sizes):,} files"
    whole = "" if folder or path.suffix.lower() in SUFFIXES else ", markup and all"
    origin = f"estimated, 4 bytes a token, {named} of {path}{whole}{left_out(skipped)}"
    return Corpus(tokens, origin)


def _of_json_lines(path: Path, column: str) -> Corpus:
    tokens, texts = 0.0, 0
    for place, text in column_of(path, column):
        if not isinstance(text, str):
            raise ConfigurationError(f"{place}: {column!r} is no text, but {type(text).__name__}.")
        # Half a surrogate pair is three bytes here; what can be embedded is not asked.
        tokens += estimate_tokens(len(text.encode(errors="surrogatepass")))
        texts += 1
    if not texts:
        raise ConfigurationError(f"--corpus: {path} has no text.")
    origin = f"estimated, 4 bytes a token, {column!r} of {texts:,} lines of {path}"
    return Corpus(tokens, origin)


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
