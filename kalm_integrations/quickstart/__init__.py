"""`kalm quickstart`: index real text in two frameworks, and ask a few questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.identity import VectorIdentity
from kalm_integrations.quickstart import docstrings, folder
from kalm_integrations.quickstart.corpus import Corpus, Hit, Question

GOOD_ANSWERS: Final = 2
"""Of the three built-in questions, at least so many must find an expected text."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the frameworks found: by framework, the hits of each question of the corpus."""

    corpus: Corpus
    identity: VectorIdentity
    vectors: str  # where they are from
    hits: dict[str, list[list[Hit]]]

    def good_answers(self, framework: str) -> list[bool]:
        """Whether each question that has expected texts found one of them."""
        return [
            any(hit.name in question.expected for hit in hits)
            for question, hits in zip(self.corpus.questions, self.hits[framework], strict=True)
            if question.expected
        ]


def run(docs: Path | None, question: str | None) -> Iterator[str | Outcome]:
    """Index a corpus through LangChain and LlamaIndex, and ask both.

    Vectors are kept in the user's cache folder: the next question on the same texts is quick.

    Args:
        docs: A folder of Markdown and text files; None is the built-in corpus.
        question: Replaces the corpus's own questions.

    Yields:
        What happens next, for a reader who waits; at the end the outcome.

    Raises:
        ConfigurationError: There is nothing to index, or nothing to ask.
        ImportError: The extra "quickstart" is not installed.
        KalmError: The engine failed.
    """
    if question is not None and not question.strip():
        raise ConfigurationError("the question is empty")
    yield "Reading the texts"
    corpus = docstrings.read() if docs is None else folder.read(docs)
    if question is not None:
        corpus = corpus._replace(questions=[Question(question)], asker="yours")
    yield "Loading LangChain, LlamaIndex and the engine"
    from kalm_integrations.quickstart.index import FRAMEWORKS, open_client, vectors_of

    with open_client() as client:
        identity = client.warm_up()
        yield f"Embedding {len(corpus.texts):,} texts"
        vectors, origin = vectors_of(client, corpus)
        indexes = {name: index(client, corpus.texts, vectors) for name, index in FRAMEWORKS.items()}
        hits = {
            name: [index.search(each.text) for each in corpus.questions]
            for name, index in indexes.items()
        }
    yield Outcome(corpus, identity, origin, hits)
