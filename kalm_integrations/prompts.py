"""Instructions: from a preset's name, a task sentence or a template to the text that is embedded.

KaLM is instruction-tuned: queries carry an instruction, documents carry none, except in symmetric
tasks, where both carry the same. The wording follows the model card and MTEB's dictionary
of tasks for this model, to the byte.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Final, Literal

Role = Literal["query", "document"]
"""The side of a search that a text is on. It chooses the instruction and the priority."""

PLACEHOLDER: Final = "{text}"
AS_IS: Final = PLACEHOLDER
"""The template that adds nothing."""

RETRIEVAL_TASK: Final = "Given a query, retrieve documents that answer the query"
RETRIEVAL: Final = f"Instruct: {RETRIEVAL_TASK} \nQuery: {PLACEHOLDER}"
"""The model card's default (`encode_query`). Both spaces, before the newline and after the
colon, are the card's; its form for custom tasks has neither."""

MTEB_PREFIX: Final = "mteb:"


@dataclass(frozen=True, slots=True)
class Preset:
    """A task of MTEB's dictionary. `symmetric`: documents carry the instruction too."""

    task: str
    symmetric: bool = False


PRESETS: Final[dict[str, Preset]] = {
    "web_search": Preset(
        "Given a web search query, retrieve relevant passages that answer the query"
    ),
    "question": Preset("Given a question, retrieve passages that answer the question"),
    "fact_check": Preset("Given a claim, retrieve documents that support or refute the claim"),
    "argument": Preset("Given a claim, find documents that refute the claim", symmetric=True),
    "duplicates": Preset(
        "Given a question, retrieve questions that are semantically equivalent to the given"
        " question",
        symmetric=True,
    ),
    "sts": Preset("Retrieve semantically similar text", symmetric=True),
    "bitext": Preset("Retrieve parallel sentences", symmetric=True),
    # "retrieval" is the dictionary's own spelling, which the model was trained with.
    "code": Preset(
        "Given a question about coding, retrieval code or passage that can solve user's question"
    ),
    "text_to_sql": Preset(
        "Given a user's question, retrieve SQL queries that are appropriate responses to the"
        " question"
    ),
    "scientific": Preset(
        "Given a scientific claim, retrieve documents that support or refute the claim"
    ),
    "finance": Preset(
        "Given a financial question, retrieve user replies that best answer the question"
    ),
    "medical": Preset(
        "Given a medical question, retrieve user replies that best answer the question"
    ),
}
"""Name → task. In addition, "retrieval" is the model card's default and "none" adds nothing."""

_NAMES: Final = ("retrieval", "none", *PRESETS)


def apply(template: str, text: str) -> str:
    """`template` with `text` at its placeholder. Braces in the text mean nothing."""
    return template.replace(PLACEHOLDER, text, 1)


def task_template(task: str) -> str:
    """The model card's form for a custom task: no space before the newline or after the colon."""
    return f"Instruct: {task}\nQuery:{PLACEHOLDER}"


def mteb_template(task: str) -> str:
    """The form of MTEB and of the authors' evaluation code; use it to reproduce MTEB's figures."""
    return f"Instruct: {task} \n Query: {PLACEHOLDER}"


def resolve(instruction: str) -> str:
    """The template for an instruction argument.

    Args:
        instruction: A preset's name ("web_search"), a task sentence ("Given a ticket, find
            its solution"), a template with `{text}`, "retrieval" for the model card's default,
            "none" for the text alone, or "mteb:" and a preset's name or task sentence.

    Returns:
        A template with `{text}` exactly once.

    Raises:
        ValueError: The instruction is empty, an unknown name, or a template with another
            placeholder, or with more than one.
    """
    name = instruction.strip()
    if not name:
        raise ValueError('an instruction is empty; for the text alone pass "none"')
    count = instruction.count(PLACEHOLDER)
    if count > 1:
        raise ValueError("a template takes {text} exactly once")
    if set("{}") & set(instruction.replace(PLACEHOLDER, "", 1)):
        raise ValueError(f"{instruction!r}: {{text}}, where the text goes, is the only placeholder")
    if count and name.startswith(MTEB_PREFIX):
        raise ValueError(f"after {MTEB_PREFIX!r} goes a preset's name or a task sentence")
    if count:
        return instruction
    if name == "retrieval":
        return RETRIEVAL
    if name == "none":
        return AS_IS
    if name.startswith(MTEB_PREFIX):
        return mteb_template(_task(name.removeprefix(MTEB_PREFIX).strip()))
    return task_template(_task(name))


def is_symmetric(instruction: str) -> bool:
    """Whether a query instruction names a preset whose documents carry the instruction too."""
    preset = PRESETS.get(instruction.strip().removeprefix(MTEB_PREFIX).strip())
    return preset is not None and preset.symmetric


def _task(name_or_sentence: str) -> str:
    if name_or_sentence == "retrieval":
        return RETRIEVAL_TASK
    if preset := PRESETS.get(name_or_sentence):
        return preset.task
    # A misspelt name must not become a task without notice; nor must one word in Latin letters.
    # Other scripts may have no spaces between words.
    plain = re.sub(r"[\W_]+", "_", name_or_sentence.casefold()).strip("_")
    one_word = (
        not re.search(r"\s", name_or_sentence)
        and max(map(ord, name_or_sentence), default=0) < 0x0250
    )
    if plain in _NAMES or one_word:
        near = difflib.get_close_matches(plain, [*PRESETS, "retrieval"], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown preset {name_or_sentence!r}: {hint}The presets are {', '.join(_NAMES)}; "
            "a task of your own is a sentence of several words"
        )
    return name_or_sentence
