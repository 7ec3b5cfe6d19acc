"""`kalm quickstart`."""

from __future__ import annotations

import os
from typing import Annotated

from cyclopts import Parameter
from rich import box
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from kalm_integrations.cli import console
from kalm_integrations.cli.failures import needs
from kalm_integrations.cli.parameters import ExistingPath
from kalm_integrations.quickstart import GOOD_ANSWERS, Outcome, run


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
    output = console.stdout()
    outcome: str | Outcome = ""
    with needs("quickstart"), output.status("Starting") as status:
        for outcome in run(corpus, question):
            if isinstance(outcome, str):
                status.update(outcome)
    assert isinstance(outcome, Outcome)
    output.print("", Rule("kalm quickstart", style="cyan"), "", _facts(outcome), sep="\n")
    tables = {name: _answers(outcome, name) for name in outcome.hits}
    names = {name: [[hit.name for hit in hits] for hits in outcome.hits[name]] for name in tables}
    if len({str(each) for each in names.values()}) == 1:  # else, texts have equal scores
        tables = {" and ".join(tables): next(iter(tables.values()))}
    for title, table in tables.items():
        output.print("", Text(title, "bold"), table, sep="\n")
    good = True
    for name in outcome.hits:
        if answers := outcome.good_answers(name):
            enough = sum(answers) >= GOOD_ANSWERS
            good = good and enough
            mark, style = ("✓", "green") if enough else ("✗", "bold red")
            found = f"{sum(answers)} of {len(answers)} questions found an expected text"
            output.print(Text(f"{mark} {name}: {found} in the top 3", style))
    output.print("", _next_steps(), sep="\n")
    return good


def _facts(outcome: Outcome) -> Table:
    space = outcome.identity.space
    return _grid(
        ("Engine", f"{space.model}, {outcome.identity.dimensions} dimensions"),
        ("", "A small model in this process, to learn with. It is not KaLM."),
        ("Identity", f"space {space.fingerprint}, vectors {outcome.identity.fingerprint}"),
        ("Texts", outcome.corpus.origin),
        ("Vectors", outcome.vectors),
        ("Questions", outcome.corpus.asker),
    )


def _answers(outcome: Outcome, framework: str) -> Table:
    table = Table(box=box.ROUNDED, border_style="dim", expand=True)
    table.add_column("Question, and its top 3 hits", ratio=1)
    table.add_column("Score", justify="right")
    for question, hits in zip(outcome.corpus.questions, outcome.hits[framework], strict=True):
        meaning = f"  ({question.meaning})" if question.meaning else ""
        table.add_row(Text.assemble((_line(question.text), "bold"), (meaning, "dim")))
        for hit in hits:
            row = Text.assemble(
                ("✓ ", "bold green") if hit.name in question.expected else "  ",
                (_line(hit.name), "cyan"),
                (f"  {_line(hit.content.removeprefix(hit.name))}", "dim"),
                no_wrap=True,
                overflow="ellipsis",
            )
            table.add_row(row, f"{hit.score:.3f}")
        table.add_section()
    return table


def _next_steps() -> Table:
    question, corpus = "kalm quickstart --question ", "kalm quickstart --corpus "
    if "MAKELEVEL" in os.environ:
        question, corpus = "make quickstart Q=", "make quickstart DOCS="
    made = 'KalmModalEmbeddings(backend="local", truncate="end")'
    return _grid(
        ("Ask", f'{question}"How do I read a zip file?"'),
        ("Search", f"{corpus}path/to/folder"),
        ("Use", f"from kalm_integrations import KalmModalEmbeddings; {made}"),
        ("", f"from kalm_integrations.llama_index import KalmModalEmbeddings; {made}"),
        ("KaLM", "kalm deploy serves it from Modal's GPUs, kalm serve --engine vllm from yours"),
    )


def _grid(*rows: tuple[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    for name, text in rows:
        table.add_row(name, Text(console.printable(text)))
    return table


def _line(text: str) -> str:
    return console.printable(" ".join(text.split()))
