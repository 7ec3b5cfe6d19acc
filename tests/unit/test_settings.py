"""The client's arguments: where each is read from, what is refused, what a cache is named after."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from typing import Any

import pytest
from pydantic import SecretStr

from kalm_integrations import prompts
from kalm_integrations.batching import RequestLimits
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.identity import VectorIdentity
from kalm_integrations.models import EMBEDDED

SPACE = EMBEDDED.space
OTHER = replace(SPACE, revision="another")
STS = "Instruct: Retrieve semantically similar text\nQuery:{text}"
MTEB_STS = "Instruct: Retrieve semantically similar text \n Query: {text}"

# name: (default, the KALM_* variable, what the variable gives, an argument that differs from it)
FIELDS: dict[str, tuple[Any, str, Any, Any]] = {
    "backend": ("auto", "local", "local", "local"),
    "app_name": ("vllm-embedding-snapshot", "mine", "mine", "another"),
    "class_name": ("VLLMEmbeddingSnapshot", "Mine", "Mine", "Another"),
    "environment_name": (None, "staging", "staging", "main"),
    "model": (None, SPACE.model, SPACE.model, None),
    "dimensions": (None, "512", 512, None),
    "query_instruction": (None, "web_search", "web_search", "none"),
    "document_instruction": (None, "passage: {text}", "passage: {text}", "none"),
    "base_url": (None, "http://there:8000", "http://there:8000", "https://here/v1"),
    "api_key": (None, "k1", SecretStr("k1"), SecretStr("k2")),
    "connect_timeout": (10.0, "2.5", 2.5, 3.0),
    "keepalive_timeout": (15.0, "2.5", 2.5, 3.0),
    "truncate": ("error", "end", "end", "error"),
    "batch_size": (128, "32", 32, 64),
    "max_concurrency": (16, "2", 2, 3),
    "timeout": (600.0, "2.5", 2.5, 30.0),
    "max_retries": (6, "0", 0, 1),
    "vector_dtype": ("float16", "float32", "float32", "float16"),
    "show_progress": (False, "1", True, False),
    "expected_identity": (None, json.dumps(OTHER.to_dict()), OTHER, SPACE),
}
BY_FIELD = pytest.mark.parametrize("name", FIELDS)


ELSEWHERE = {"base_url": "http", "app_name": "modal", "class_name": "modal"} | {
    "environment_name": "modal"
}
"""Arguments that the embedded engine has no use for, and a backend that has."""


def local(**arguments: Any) -> ClientConfig:
    return ClientConfig(**({"backend": "local"} | arguments))


def with_(**arguments: Any) -> ClientConfig:
    """`local`, or another backend where it needs one."""
    backend = next((ELSEWHERE[name] for name in arguments if name in ELSEWHERE), "local")
    return local(**({"backend": backend, "model": SPACE.model} | arguments))


def test_every_argument_is_in_the_table_above_except_the_callback_and_a_pair():
    others = {"on_usage", "transport", "modal_key", "modal_secret"}
    assert FIELDS.keys() | others == ClientConfig.model_fields.keys()


def test_a_proxy_token_is_a_pair(monkeypatch):
    with pytest.raises(ConfigurationError, match="modal_key and modal_secret go together"):
        local(modal_key="id")
    monkeypatch.setenv("KALM_MODAL_KEY", "id")
    monkeypatch.setenv("KALM_MODAL_SECRET", "secret")
    assert (local().modal_key, local().modal_secret) == (SecretStr("id"), SecretStr("secret"))


@pytest.mark.parametrize("name", ["api_key", "modal_key", "modal_secret"])
def test_a_credential_shows_nowhere(name):
    pair = {"modal_key": "id-1234", "modal_secret": "secret-1234"}
    made = local(**(pair | {name: "hunter2"}))
    assert "hunter2" not in f"{made!r} {made} {made.model_dump()} {made.model_dump_json()}"
    with pytest.raises(ConfigurationError) as caught:
        local(**(pair | {name: "hunter2", "timeout": -1}))
    assert "hunter2" not in str(caught.value)


def test_a_variable_that_cannot_work_is_named(monkeypatch):
    monkeypatch.setenv("KALM_BATCH_SIZE", "many")
    with pytest.raises(ConfigurationError, match=r"^batch_size \(from KALM_BATCH_SIZE\): Input "):
        local()
    assert local(batch_size=3).batch_size == 3


def test_the_class_on_modal_is_named_as_everywhere(monkeypatch):
    assert with_(class_name="Mine").class_name == "Mine"
    monkeypatch.setenv("KALM_CLASS_NAME", "Theirs")
    assert ClientConfig(backend="modal").class_name == "Theirs"
    assert with_(class_name="Mine").class_name == "Mine"
    monkeypatch.setenv("KALM_CLASS_NAME", "")
    with pytest.raises(ConfigurationError, match=r"^class_name: "):
        with_(class_name="")


@pytest.mark.parametrize(
    "variables",
    [
        {"MODAL_TOKEN_ID": "ak", "MODAL_TOKEN_SECRET": "as"},
        {"MODAL_IS_REMOTE": "1"},
        {"MODAL_CONFIG_PATH": __file__},
    ],
)
def test_auto_takes_modal_where_its_package_and_a_token_are(variables, monkeypatch):
    monkeypatch.delenv("MODAL_TOKEN_ID", raising=False)
    monkeypatch.setenv("MODAL_CONFIG_PATH", os.devnull)
    with pytest.raises(ConfigurationError, match="run `modal setup`"):
        ClientConfig()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ClientConfig().resolved_backend == "modal"
    assert ClientConfig(backend="http").resolved_backend == "http"  # its address is looked up
    assert ClientConfig(base_url="http://there").resolved_backend == "http"
    monkeypatch.setattr("kalm_integrations.backends.find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match="install modal"):
        ClientConfig()


def test_what_warm_up_returned_can_be_expected():
    expected = VectorIdentity(space=OTHER, dimensions=512, document_template="{text}")
    assert local(expected_identity=expected).expected_identity == OTHER


def test_auto_takes_the_service_that_is_configured(monkeypatch):
    assert ClientConfig(base_url="http://there").resolved_backend == "http"
    monkeypatch.setenv("KALM_BASE_URL", "http://there")
    assert ClientConfig().resolved_backend == "http"
    assert local().resolved_backend == "local"


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        (None, "needs base_url= or KALM_BASE_URL"),
        ("there:8000", "base_url is not like"),
        ("ftp://there", "base_url is not like"),
        ("http://", "base_url is not like"),
        ("http://there/v1?key=1", "base_url is not like"),
        ("http://me:hunter2@there", "base_url holds a credential"),
    ],
)
def test_a_base_url_that_cannot_work_is_refused(url, complaint):
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        ClientConfig(backend="http", base_url=url)
    assert "hunter2" not in str(caught.value)


def test_over_http_the_model_chooses_what_is_expected():
    kalm = ClientConfig(base_url="http://there")
    assert kalm.served_model == "tencent/KaLM-Embedding-Gemma3-12B-2511"
    assert (kalm.query_template, kalm.vector_dimensions) == (prompts.RETRIEVAL, 3840)
    assert ClientConfig(base_url="http://there", dimensions=256).vector_dimensions == 256
    embedded = ClientConfig(base_url="http://there", model=SPACE.model)
    assert (embedded.expected_space, embedded.vector_dimensions) == (SPACE, 512)
    unknown = ClientConfig(base_url="http://there", model="some/model", dimensions=77)
    assert not unknown.expected_space.declared
    assert (unknown.query_template, unknown.vector_dimensions) == ("{text}", 77)
    namespaces = {made.cache_namespace for made in (kalm, embedded, unknown)}
    assert len(namespaces) == 3


def test_the_same_vectors_have_the_same_namespace_through_any_door():
    door = ClientConfig(base_url="http://there", model=SPACE.model)
    assert door.cache_namespace == local().cache_namespace


@BY_FIELD
def test_without_argument_and_variable_the_default_holds(name):
    default, *_ = FIELDS[name]
    assert ClientConfig.model_fields[name].default == default
    assert name == "backend" or getattr(local(), name) == default


@BY_FIELD
def test_a_variable_goes_before_the_default(name, monkeypatch):
    monkeypatch.setenv("KALM_BACKEND", "local")
    _, variable, value, _ = FIELDS[name]
    monkeypatch.setenv(ClientConfig.variables()[name], variable)
    assert getattr(ClientConfig(), name) == value


@BY_FIELD
def test_an_argument_goes_before_a_variable_even_one_that_is_wrong(name, monkeypatch):
    _, variable, _, argument = FIELDS[name]
    for content in (variable, "not a {valid} value"):
        monkeypatch.setenv(ClientConfig.variables()[name], content)
        assert getattr(with_(**{name: argument}), name) == argument


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {"backend"}))
def test_an_empty_variable_is_an_unset_one(name, monkeypatch):
    monkeypatch.setenv(ClientConfig.variables()[name], "")
    assert getattr(local(), name) == FIELDS[name][0]


@BY_FIELD
def test_settings_are_fixed_once_they_were_checked(name):
    made = local(api_key="k0")
    with pytest.raises(AttributeError) as caught:
        setattr(made, name, "hunter2")
    assert str(caught.value) == f"{name} is fixed: construct another ClientConfig"
    assert made == local(api_key="k0")


def test_an_updated_copy_is_checked_like_any_other():
    made = local(batch_size=7, api_key="k1")
    copied = made.model_copy(update={"truncate": "end", "timeout": 7})
    assert (copied.truncate, copied.batch_size, copied.timeout) == ("end", 7, 7.0)
    assert copied.api_key == SecretStr("k1")
    assert "k2-secret" not in repr(made.model_copy(update={"api_key": "k2-secret"}))
    for wrong in ({"batch_size": 0}, {"query_instrution": "question"}, {"dimensions": 64}):
        with pytest.raises(ConfigurationError):
            made.model_copy(update=wrong)
    assert made.model_copy() == made


def test_an_argument_that_does_not_go_with_others_is_named_with_its_variable(monkeypatch):
    for name, value in (
        ("KALM_DIMENSIONS", "1024"),
        ("KALM_QUERY_INSTRUCTION", "web_serch"),
        ("KALM_MODAL_KEY", "id"),
        ("KALM_BASE_URL", "http://u:hunter2@there"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ConfigurationError) as caught:
            patch.setenv(name, value)
            local(backend="http" if "URL" in name else "local")
        assert f"(from {name})" in str(caught.value)
        assert "hunter2" not in str(caught.value)


def test_the_callback_is_an_argument_only(monkeypatch):
    monkeypatch.setenv("KALM_ON_USAGE", "print")
    assert local().on_usage is None
    assert local(on_usage=print).on_usage is print
    assert "on_usage" not in local(on_usage=print).model_dump()


@pytest.mark.parametrize(("variable", "shown"), [("true", True), ("0", False), ("false", False)])
def test_a_switch_is_read_from_its_variable_as_it_is_usually_written(variable, shown, monkeypatch):
    monkeypatch.setenv("KALM_SHOW_PROGRESS", variable)
    assert local().show_progress is shown


def test_variables_are_read_when_the_settings_are_made_and_not_later(monkeypatch):
    made = local()
    monkeypatch.setenv("KALM_BATCH_SIZE", "7")
    assert (made.batch_size, local().batch_size) == (128, 7)


@pytest.mark.parametrize("variable", ["", "auto"])
def test_auto_never_falls_back_to_the_embedded_engine_but_says_how_to_choose_it(
    variable, monkeypatch
):
    monkeypatch.setenv("KALM_BACKEND", variable)
    with pytest.raises(ValueError, match='backend="local" or set KALM_BACKEND=local'):
        ClientConfig()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            {"batchsize": 3},
            "batchsize: there is no such argument. Did you mean batch_size? There are backend, ",
        ),
        ({"model_kwargs": {}}, "model_kwargs: there is no such argument. There are backend, "),
        ({"backend": "remote"}, "Input should be 'auto', 'modal', 'http' or 'local'"),
        (
            {"model": "bge-m3"},
            "model='bge-m3': backend=\"local\" runs 'universal-",
        ),
        (
            {"dimensions": 256},
            "dimensions=256: universal-sentence-encoder-multilingual-3 has 512; leave",
        ),
        ({"dimensions": 0}, "dimensions=0"),
        ({"query_instruction": "web_serch"}, "did you mean 'web_search'?"),
        ({"document_instruction": "web_serch"}, "did you mean 'web_search'?"),
        ({"query_instruction": ""}, 'for the text alone pass "none"'),
        ({"document_instruction": "{title} {text}"}, "is the only placeholder"),
        ({"truncate": "start"}, "Input should be 'error' or 'end'"),
        ({"batch_size": 0}, "batch_size: Input should be greater than or equal to 1"),
        ({"batch_size": 2049}, "batch_size: Input should be less than or equal to 2048"),
        ({"max_concurrency": 0}, "max_concurrency: Input should be greater than or equal to 1"),
        ({"max_concurrency": 257}, "max_concurrency: Input should be less than or equal to 256"),
        ({"timeout": 0}, "timeout: Input should be greater than 0"),
        ({"timeout": float("inf")}, "timeout: Input should be a finite number"),
        ({"timeout": float("nan")}, "timeout: Input should be a finite number"),
        ({"max_retries": -1}, "max_retries: Input should be greater than or equal to 0"),
        ({"max_retries": 101}, "max_retries: Input should be less than or equal to 100"),
        ({"vector_dtype": "bfloat16"}, "Input should be 'float16' or 'float32'"),
        ({"on_usage": "print"}, "Input should be callable"),
        (
            {"expected_identity": "{"},
            "nor one of kalm-bf16, kalm-fp8",
        ),
        ({"expected_identity": '{"model": "m"}'}, "not a space identity: missing ['attention',"),
        ({"expected_identity": SPACE.to_dict() | {"profile": "1"}}, "profile is '1'"),
        ({"expected_identity": 7}, "an instance of SpaceIdentity"),
        (
            {"expected_identity": "[]"},
            "nor one of kalm-bf16, kalm-fp8",
        ),
    ],
)
def test_an_argument_that_cannot_work_is_refused_by_name_before_anything_is_opened(
    arguments, complaint
):
    with pytest.raises(ConfigurationError, match=re.escape(complaint)) as caught:
        local(**arguments)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ["batch_size", "timeout", "expected_identity", "show_progress"])
def test_a_variable_that_cannot_work_is_refused_by_name(name, monkeypatch):
    monkeypatch.setenv(ClientConfig.variables()[name], "many")
    with pytest.raises(ConfigurationError, match=name):
        local()


def test_an_error_does_not_show_what_was_passed_for_it_may_be_a_secret():
    with pytest.raises(ConfigurationError) as caught:
        local(batch_size="hunter2", api_key="hunter2")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("form", [OTHER, OTHER.to_dict(), json.dumps(OTHER.to_dict())])
def test_the_expected_identity_comes_as_an_object_a_dict_or_json(form):
    assert local(expected_identity=form).expected_space == OTHER


def test_by_default_the_backends_own_space_is_expected():
    assert local().expected_space == SPACE


@pytest.mark.parametrize(
    ("arguments", "query", "document"),
    [
        ({}, "{text}", "{text}"),
        ({"query_instruction": "find: {text}"}, "find: {text}", "{text}"),
        ({"document_instruction": "doc: {text}"}, "{text}", "doc: {text}"),
        ({"query_instruction": "sts"}, STS, STS),
        ({"query_instruction": "mteb:sts"}, MTEB_STS, MTEB_STS),
        ({"query_instruction": "sts", "document_instruction": "none"}, STS, "{text}"),
    ],
)
def test_documents_carry_no_instruction_unless_one_is_given_or_the_task_is_symmetric(
    arguments, query, document
):
    made = local(**arguments)
    assert (made.query_template, made.document_template) == (query, document)
    assert (made.template("query"), made.template("document")) == (query, document)


def test_what_an_index_holds_is_declared_without_asking_a_service():
    made = local(document_instruction="doc: {text}", query_instruction="q: {text}")
    assert made.vector_identity == VectorIdentity(
        space=SPACE, dimensions=512, document_template="doc: {text}"
    )


def test_request_limits_follow_the_batch_size_and_the_models_length():
    assert local(batch_size=9).request_limits == RequestLimits(texts=9, text_tokens=8192)


# Other document vectors: each needs a cache of its own.
MOVES_DOCUMENTS: list[dict[str, Any]] = [
    {},
    {"document_instruction": "doc: {text}"},
    {"document_instruction": "web_search"},
    {"query_instruction": "sts"},
    {"query_instruction": "mteb:sts"},
    {"truncate": "end"},
    {"expected_identity": OTHER},
]
# The same document vectors, said or fetched in another way.
KEEPS_DOCUMENTS: list[dict[str, Any]] = [
    {"model": SPACE.model},
    {"dimensions": 512},
    {"expected_identity": SPACE},
    {"document_instruction": "none"},
    {"query_instruction": "web_search"},
    {"query_instruction": "sts", "document_instruction": "none"},
    {"batch_size": 1},
    {"max_concurrency": 1},
    {"timeout": 1},
    {"max_retries": 0},
    {"base_url": "http://there"},
    {"app_name": "mine"},
    {"class_name": "Mine"},
    {"environment_name": "staging"},
    {"api_key": "k"},
    {"modal_key": "id", "modal_secret": "secret"},
    {"connect_timeout": 1},
    {"keepalive_timeout": 1},
    {"vector_dtype": "float32"},
    {"show_progress": True},
    {"on_usage": print},
]


def test_every_argument_is_known_to_move_document_vectors_or_not():
    known = {name for arguments in MOVES_DOCUMENTS + KEEPS_DOCUMENTS for name in arguments}
    assert known | {"backend", "transport"} == ClientConfig.model_fields.keys()


def test_the_cache_namespace_changes_with_whatever_may_move_document_vectors():
    names = {local(**arguments).cache_namespace for arguments in MOVES_DOCUMENTS}
    assert len(names) == len(MOVES_DOCUMENTS)


@pytest.mark.parametrize("arguments", KEEPS_DOCUMENTS)
def test_the_cache_namespace_stays_where_document_vectors_do(arguments):
    assert with_(**arguments).cache_namespace == local().cache_namespace


def test_two_ways_to_say_one_instruction_share_a_cache():
    sentence = prompts.PRESETS["web_search"].task
    by_name, by_sentence = (
        local(document_instruction="web_search"),
        local(document_instruction=sentence),
    )
    assert by_name.cache_namespace == by_sentence.cache_namespace


@pytest.mark.parametrize(
    "arguments",
    [{"query_instruction": "web_search"}, {"truncate": "end"}, {"expected_identity": OTHER}],
)
def test_the_query_cache_namespace_changes_with_whatever_may_move_query_vectors(arguments):
    assert local(**arguments).query_cache_namespace != local().query_cache_namespace


@pytest.mark.parametrize(
    "arguments",
    [{"query_instruction": "none"}, {"batch_size": 1}, {"vector_dtype": "float32"}, {"timeout": 1}],
)
def test_the_query_cache_namespace_stays_where_query_vectors_do(arguments):
    assert local(**arguments).query_cache_namespace == local().query_cache_namespace


@pytest.mark.parametrize("instruction", ["none", "语言 {text}", "a/../b:\n{text}", "mteb:sts"])
def test_cache_namespaces_are_safe_as_file_names_and_differ_between_roles(instruction):
    made = local(query_instruction=instruction, document_instruction=instruction)
    for role, name in (("document", made.cache_namespace), ("query", made.query_cache_namespace)):
        assert re.fullmatch(rf"kalm-{role}-[A-Za-z0-9-]+", name)


def test_the_cache_namespace_outlives_releases():
    assert local().cache_namespace == "kalm-document-628a8298b84359f4"
