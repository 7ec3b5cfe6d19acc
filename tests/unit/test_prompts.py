"""Instructions, to the byte: one space more or less moves every vector of an index."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kalm_integrations import prompts

BRACES = st.sampled_from(["{text}", "{", "}", "{0}", "{{", "x", "\n"])
BRACED = st.lists(BRACES | st.text(max_size=3), max_size=6).map("".join)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="{}:"), min_size=1)

TASKS = {
    "web_search": "Given a web search query, retrieve relevant passages that answer the query",
    "question": "Given a question, retrieve passages that answer the question",
    "fact_check": "Given a claim, retrieve documents that support or refute the claim",
    "argument": "Given a claim, find documents that refute the claim",
    "duplicates": "Given a question, retrieve questions that are semantically equivalent to the "
    "given question",
    "sts": "Retrieve semantically similar text",
    "bitext": "Retrieve parallel sentences",
    "code": "Given a question about coding, retrieval code or passage that can solve user's "
    "question",
    "text_to_sql": "Given a user's question, retrieve SQL queries that are appropriate responses "
    "to the question",
    "scientific": "Given a scientific claim, retrieve documents that support or refute the claim",
    "finance": "Given a financial question, retrieve user replies that best answer the question",
    "medical": "Given a medical question, retrieve user replies that best answer the question",
}


def test_the_default_prompt_is_the_model_cards():
    assert prompts.apply(prompts.resolve("retrieval"), "How tall is K2?").encode() == (
        b"Instruct: Given a query, retrieve documents that answer the query \n"
        b"Query: How tall is K2?"
    )


@pytest.mark.parametrize(
    ("instruction", "prompted"),
    [
        ("none", "K2"),
        ("{text}", "K2"),
        (
            "Given a ticket, find its solution",
            "Instruct: Given a ticket, find its solution\nQuery:K2",
        ),
        ("passage: {text}", "passage: K2"),
        ("<q>{text}</q>", "<q>K2</q>"),
        (" sts\n", "Instruct: Retrieve semantically similar text\nQuery:K2"),
        (" none ", "K2"),
        (
            "mteb:retrieval",
            "Instruct: Given a query, retrieve documents that answer the query \n Query: K2",
        ),
        ("mteb:sts", "Instruct: Retrieve semantically similar text \n Query: K2"),
        ("mteb: sts", "Instruct: Retrieve semantically similar text \n Query: K2"),
        (
            "mteb:Given a ticket, find its solution",
            "Instruct: Given a ticket, find its solution \n Query: K2",
        ),
    ],
)
def test_an_instruction_is_a_name_a_task_sentence_or_a_template(instruction, prompted):
    assert prompts.apply(prompts.resolve(instruction), "K2") == prompted


@pytest.mark.parametrize(("name", "task"), TASKS.items())
def test_every_preset_has_the_wording_of_the_models_dictionary_of_tasks(name, task):
    assert prompts.resolve(name) == f"Instruct: {task}\nQuery:{{text}}"
    assert prompts.resolve(f"mteb:{name}") == f"Instruct: {task} \n Query: {{text}}"


def test_every_preset_is_tested():
    assert TASKS.keys() == prompts.PRESETS.keys()


@pytest.mark.parametrize("name", TASKS)
def test_documents_have_the_instruction_in_symmetric_tasks_only(name):
    symmetric = name in {"argument", "duplicates", "sts", "bitext"}
    assert prompts.is_symmetric(name) == prompts.is_symmetric(f"mteb:{name}") == symmetric


@pytest.mark.parametrize(
    "instruction", ["retrieval", "none", "Retrieve parallel sentences", "{text}"]
)
def test_only_a_presets_name_is_symmetric(instruction):
    assert not prompts.is_symmetric(instruction)


@pytest.mark.parametrize("sentence", ["检索能够回答问题的文档", "质問に答える文書を探す", "поиск"])
def test_a_sentence_in_a_script_without_spaces_is_a_task(sentence):
    assert prompts.resolve(sentence) == f"Instruct: {sentence}\nQuery:{{text}}"


@pytest.mark.parametrize(
    ("instruction", "complaint"),
    [
        ("", 'is empty; for the text alone pass "none"'),
        (" \n", "is empty"),
        ("web_serch", "unknown preset 'web_serch': did you mean 'web_search'?"),
        ("mteb:medicine", "unknown preset 'medicine': did you mean 'medical'?"),
        ("retreival", "did you mean 'retrieval'?"),
        ("text-to-sql", "did you mean 'text_to_sql'?"),
        ("xyzzy", "unknown preset 'xyzzy': The presets are retrieval, none, web_search,"),
        ("mteb:", "unknown preset ''"),
        ("Query: {query}", "{text}, where the text goes, is the only placeholder"),
        ("{task} {text}", "is the only placeholder"),
        ("Query: {text }", "is the only placeholder"),
        ("Query: {}", "is the only placeholder"),
        ("Query: {{text}}", "is the only placeholder"),
        ("mteb:foo {text}", "after 'mteb:' goes a preset's name or a task sentence"),
        ("{text} or {text}", "exactly once"),
    ],
)
def test_an_ambiguous_instruction_is_refused(instruction, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        prompts.resolve(instruction)


def test_an_unknown_name_lists_the_presets():
    with pytest.raises(ValueError, match="The presets are") as caught:
        prompts.resolve("xyzzy")
    assert "did you mean" not in str(caught.value)


@given(before=BRACED, text=BRACED, after=BRACED)
def test_braces_in_a_text_mean_nothing(before, text, after):
    before = before.replace("{text}", "")
    assert prompts.apply(before + "{text}" + after, text) == before + text + after


@given(WORDS.map(str.strip).filter(bool), WORDS.map(str.strip).filter(bool))
def test_a_task_sentence_is_used_verbatim(first, second):
    sentence = f"{first} {second}"
    # "web search" and "| NONE" are presets, misspelt: the next test's matter.
    words = re.findall(r"[^\W_]+", sentence.casefold())
    assume("_".join(words) not in {*prompts.PRESETS, "retrieval", "none"})
    assert prompts.apply(prompts.resolve(sentence), "K2") == f"Instruct: {sentence}\nQuery:K2"


@pytest.mark.parametrize(
    "misspelt", ["web search", "Web-Search.", "| NONE", "text to SQL", "STS !"]
)
def test_a_misspelt_preset_is_not_a_task(misspelt):
    with pytest.raises(ValueError, match=f"unknown preset {re.escape(repr(misspelt))}"):
        prompts.resolve(misspelt)
