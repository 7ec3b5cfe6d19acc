"""`kalm quickstart`: real text in two frameworks, and a few questions, in half a minute."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.quickstart import docstrings, folder
from kalm_integrations.quickstart.corpus import Question, Text
from kalm_integrations.quickstart.report import Answer, Report

if TYPE_CHECKING:
    from kalm_integrations.quickstart.indexes import Index

GOOD_ANSWERS: Final = 2
"""Of the three built-in questions, at least so many must find an expected text."""

_SLICE: Final = 64  # texts between two moves of the progress bar


def run(docs: Path | None = None, question: str | None = None) -> bool:
    """Index a corpus through LangChain and through LlamaIndex, ask both, print what they find.

    Args:
        docs: A folder of Markdown and text files, instead of the built-in corpus.
        question: Asked instead of the corpus's own questions.

    Returns:
        Whether each framework found what the built-in questions should find; True where nobody
        knows what should be found.

    Raises:
        ConfigurationError: There is nothing to index, or nothing to ask.
        ImportError: The extra "quickstart" is not installed.
        KalmError: The engine failed.
    """
    if question is not None and not question.strip():
        raise ConfigurationError("the question is empty")
    report = Report()
    with report.working("Reading the texts"):
        corpus = docstrings.read() if docs is None else folder.read(docs)
    if question is not None:
        corpus = replace(corpus, questions=[Question(question)], asker="yours")
    with report.working("Loading LangChain, LlamaIndex and the engine"):
        from kalm_integrations.quickstart.indexes import open_indexes

        identity, indexes = open_indexes()
    report.opening(identity, corpus)
    for index in indexes:
        _fill(index, corpus.texts, report)
    answers = {index: [_ask(index, asked) for asked in corpus.questions] for index in indexes}
    for index in indexes:
        report.answers(f"{index.framework}, {index.store}", answers[index])
    judged = [_judge(report, index.framework, answers[index]) for index in indexes]
    report.next_steps()
    return all(judged)


def _fill(index: Index, texts: Sequence[Text], report: Report) -> None:
    with report.progress(index.framework, len(texts)) as advance:
        for start in range(0, len(texts), _SLICE):
            part = texts[start : start + _SLICE]
            index.add(part)
            advance(len(part))


def _ask(index: Index, question: Question) -> Answer:
    started = time.perf_counter()
    hits = index.search(question.text)
    return Answer(question, hits, time.perf_counter() - started)


def _judge(report: Report, framework: str, answers: Sequence[Answer]) -> bool:
    known = [answer for answer in answers if answer.question.expected]
    if not known:
        return True
    found = sum(answer.good for answer in known)
    report.verdict(framework, found, len(known), found >= GOOD_ANSWERS)
    return found >= GOOD_ANSWERS
