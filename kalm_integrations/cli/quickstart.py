"""`kalm quickstart`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from kalm_integrations.cli.failures import needs
from kalm_integrations.cli.parameters import ExistingPath


def quickstart(
    *,
    corpus: Annotated[
        ExistingPath | None,
        Parameter(
            help="A folder of Markdown, reStructuredText and text files. Default: the docstrings "
            "of Python's standard library."
        ),
    ] = None,
    question: Annotated[
        str | None, Parameter(help="Ask this instead of the corpus's own questions.")
    ] = None,
) -> bool:
    """Index a corpus and ask it questions; return whether the expected texts were found."""
    with needs("quickstart"):
        from kalm_integrations.quickstart import run

        return run(corpus, question)
