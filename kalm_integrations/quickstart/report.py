"""What the quickstart prints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text as Line

from kalm_integrations.identity import VectorIdentity
from kalm_integrations.quickstart.corpus import Corpus, Question

if TYPE_CHECKING:
    from kalm_integrations.quickstart.indexes import Hit

WIDEST: Final = 120
"""Columns: wider tables are harder to read."""

LANGCHAIN_CODE: Final = """\
from kalm_integrations import KalmModalEmbeddings
from langchain_qdrant import QdrantVectorStore

embeddings = KalmModalEmbeddings(backend="local", truncate="end")
store = QdrantVectorStore.from_texts(texts, embeddings, location=":memory:")
hits = store.similarity_search_with_score(question, k=3)
"""

LLAMA_INDEX_CODE: Final = """\
from kalm_integrations.llama_index import KalmModalEmbeddings
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode

embeddings = KalmModalEmbeddings(backend="local", truncate="end")
nodes = [TextNode(text=text) for text in texts]
index = VectorStoreIndex(nodes, embed_model=embeddings)
hits = index.as_retriever(similarity_top_k=3).retrieve(question)
"""


_STEPS: Final = {
    "make": (
        'make quickstart Q="How do I read a zip file?"',
        "make quickstart DOCS=path/to/folder",
    ),
    "kalm": (
        'kalm quickstart --question "How do I read a zip file?"',
        "kalm quickstart --corpus path/to/folder",
    ),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What one framework found for one question, and in how many seconds."""

    question: Question
    hits: list[Hit]
    seconds: float

    @property
    def good(self) -> bool:
        """Whether an expected text is among the hits."""
        return any(hit.name in self.question.expected for hit in self.hits)


class Report:
    """Prints to a terminal, or plain to anything else."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._console.width = min(self._console.width, WIDEST)

    def working(self, what: str) -> AbstractContextManager[object]:
        """A spinner, while something takes a moment."""
        return self._console.status(what)

    def opening(self, identity: VectorIdentity, corpus: Corpus) -> None:
        """Which engine makes the vectors, and of what."""
        engine = Line.assemble(
            (identity.space.model, "bold cyan"),
            f"\n{identity.dimensions} dimensions, vector identity {identity.fingerprint}\n",
            ("A small model in this process, to learn with. It is not KaLM.", "dim"),
        )
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="bold")
        facts.add_row("Engine", engine)
        facts.add_row("Texts", Line(corpus.origin))
        facts.add_row("Questions", Line(corpus.asker))
        self._section("kalm quickstart")
        self._console.print(facts, "", sep="\n")

    @contextmanager
    def progress(self, framework: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar for `total` texts; yields what moves it on."""
        bar = Progress(
            TextColumn("{task.description:<10}", style="bold"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            TextColumn("{task.fields[state]:>34}", style="dim"),
            console=self._console,
            expand=True,
        )
        task = bar.add_task(framework, total=total, state="")
        done, started = 0, time.perf_counter()

        def advance(count: int) -> None:
            nonlocal done
            done += count
            seconds = time.perf_counter() - started
            state = f"{done:,} texts, {seconds:.1f} s, {done / seconds:,.0f}/s"
            bar.update(task, completed=done, state=state)

        with bar:
            yield advance

    def answers(self, title: str, answers: Sequence[Answer]) -> None:
        """One framework's table."""
        table = Table(box=box.ROUNDED, border_style="dim", expand=True)
        table.add_column("Question, and its top 3 hits", ratio=1)
        table.add_column("Score", justify="right")
        table.add_column("Time", justify="right")
        for answer in answers:
            milliseconds = Line(f"{answer.seconds * 1000:.0f} ms")
            table.add_row(_asked(answer.question), "", milliseconds)
            for hit in answer.hits:
                table.add_row(_found(hit, answer.question), Line(f"{hit.score:.3f}"))
            table.add_section()
        self._console.print("", Line(title, "bold"), table, sep="\n")

    def verdict(self, framework: str, found: int, asked: int, enough: bool) -> None:
        """How many questions found what they should."""
        mark, style = ("✓", "green") if enough else ("✗", "bold red")
        what = f"{framework}: {found} of {asked} questions found an expected text in the top 3"
        self._console.print(Line(f"{mark} {what}", style))

    def next_steps(self) -> None:
        """What to do now."""
        own_question, own_folder = _STEPS["make" if "MAKELEVEL" in os.environ else "kalm"]
        self._section("What next")
        self._hint("Ask your own question", Line(own_question, "cyan"))
        self._hint("Search your own folder", Line(own_folder, "cyan"))
        self._hint("Do it in your app, with LangChain", _python(LANGCHAIN_CODE))
        self._hint("or with LlamaIndex", _python(LLAMA_INDEX_CODE))
        self._console.print(
            "KaLM itself, with the same classes: `kalm deploy` serves it from Modal's GPUs, "
            "`kalm serve --engine vllm` from one of yours, and `kalm cost` says what it costs."
        )

    def _section(self, title: str) -> None:
        self._console.print("", Rule(Line(title, "bold"), style="cyan"), "", sep="\n")

    def _hint(self, what: str, how: RenderableType) -> None:
        self._console.print(Line(what, "bold"), Padding(how, (0, 0, 1, 2)), sep="\n")


def _asked(question: Question) -> Line:
    meaning = f"  ({question.meaning})" if question.meaning else ""
    return Line.assemble((_visible(question.text), "bold"), (meaning, "dim"))


def _found(hit: Hit, question: Question) -> Line:
    return Line.assemble(
        ("✓ ", "bold green") if hit.name in question.expected else "  ",
        (_visible(hit.name), "cyan"),
        ("  " + _visible(hit.content.removeprefix(hit.name)), "dim"),
        no_wrap=True,
        overflow="ellipsis",
    )


def _visible(text: str) -> str:
    """`text` on one line, without anything that could steer a terminal."""
    return "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text.split()))


def _python(code: str) -> Syntax:
    return Syntax(code.rstrip(), "python", theme="ansi_dark", background_color="default")
