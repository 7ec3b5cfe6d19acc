"""The client's arguments: where each is read from, what is refused, what a cache is named after."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import re
from dataclasses import replace
from typing import Any, get_type_hints

import pytest
from pydantic import SecretStr

from kalm_integrations import KalmClient, KalmModalEmbeddings, llama_index, prompts
from kalm_integrations.batching import RequestLimits
from kalm_integrations.config import ClientConfig
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.identity import VectorIdentity
from kalm_integrations.models import EMBEDDED
from kalm_integrations.options import ClientOptions

CLASSES = [KalmClient, KalmModalEmbeddings, llama_index.KalmModalEmbeddings]
SPACE = EMBEDDED.space
MINI = "KaLM-Embedding/KaLM-embedding-multilingual-mini-instruct-v2.5"
OTHER = replace(SPACE, revision="another")
STS = "Instruct: Retrieve semantically similar text\nQuery:{text}"
MTEB_STS = "Instruct: Retrieve semantically similar text \n Query: {text}"

# name: (default, the KALM_* variable, its value as read, an argument that differs from it)
FIELDS: dict[str, tuple[Any, str, Any, Any]] = {
    "backend": ("auto", "local", "local", "local"),
    "app_name": ("vllm-embedding-snapshot", "mine", "mine", "another"),
    "class_name": ("VLLMEmbeddingSnapshot", "Mine", "Mine", "Another"),
    "environment_name": (None, "staging", "staging", "main"),
    "model": (None, SPACE.model, SPACE.model, None),
    "profile": (None, MINI, MINI, "tencent/KaLM-Embedding-Gemma3-12B-2511"),
    "dimensions": (None, "512", 512, None),
    "query_instruction": (None, "web_search", "web_search", "none"),
    "document_instruction": (None, "passage: {text}", "passage: {text}", "none"),
    "base_url": (None, "http://there:8000", "http://there:8000", "https://here/v1"),
    "hedge": (False, "true", True, False),
    "api_key": (None, "k1", SecretStr("k1"), SecretStr("k2")),
    "connect_timeout": (10.0, "2.5", 2.5, 3.0),
    "keepalive_timeout": (15.0, "2.5", 2.5, 3.0),
    "truncate": ("error", "end", "end", "error"),
    "batch_size": (128, "32", 32, 64),
    "max_concurrency": (16, "2", 2, 3),
    "timeout": (600.0, "2.5", 2.5, 30.0),
    "max_retries": (6, "0", 0, 1),
    "vector_dtype": ("float16", "float32", "float32", "float16"),
    "show_progress": (False, "true", True, False),
    "expected_identity": (None, json.dumps(OTHER.to_dict()), OTHER, SPACE),
}
BY_FIELD = pytest.mark.parametrize("name", FIELDS)
OTHER_BACKENDS = {
    "base_url": "http",
    "app_name": "modal",
    "class_name": "modal",
    "environment_name": "modal",
    "profile": "modal",
}
"""Arguments that backend="local" excludes, and a backend that uses them."""


def local(**arguments: Any) -> ClientConfig:
    return ClientConfig(**({"backend": "local"} | arguments))


def configured(**arguments: Any) -> ClientConfig:
    """`local`, or with the backend that an argument needs."""
    backend = next((OTHER_BACKENDS[name] for name in arguments if name in OTHER_BACKENDS), "local")
    return local(**({"backend": backend, "model": SPACE.model} | arguments))


class TestParity:
    def test_documented_and_validated_arguments_are_the_same(self):
        fields = ClientConfig.model_fields
        assert list(get_type_hints(ClientOptions)) == list(fields)
        assert FIELDS.keys() | {"on_usage", "transport", "modal_key", "modal_secret"} == set(fields)

    @pytest.mark.parametrize("cls", CLASSES)
    def test_every_argument_has_its_type_default_and_meaning(self, cls):
        parameters = inspect.signature(cls).parameters
        assert set(parameters) - {"client"} >= ClientConfig.model_fields.keys()
        for name, parameter in parameters.items():
            assert parameter.annotation is not inspect.Parameter.empty
            assert parameter.default is not inspect.Parameter.empty
            assert re.search(rf"^ +{name}: \S.* Default: ", cls.__doc__, re.M), name

    @pytest.mark.parametrize("cls", CLASSES)
    @pytest.mark.parametrize(("name", "default"), [(n, each[0]) for n, each in FIELDS.items()])
    def test_defaults_are_shown_as_they_are(self, cls, name, default):
        assert ClientConfig.model_fields[name].default == default
        assert inspect.signature(cls).parameters[name].default == default
        text = re.search(rf"^ +{name}: .* Default: (.*)\.$", cls.__doc__, re.M)[1]
        shown = json.dumps(default) if isinstance(default, str) else str(default)
        assert text == shown.removesuffix(".0")

    @pytest.mark.parametrize("cls", CLASSES)
    def test_a_positional_argument_is_refused_with_the_class_and_the_way_to_name_the_model(
        self, cls
    ):
        with pytest.raises(TypeError, match=rf"{cls.__name__}\(model="):
            cls("some/model")


class TestSources:
    @BY_FIELD
    def test_the_default_applies_without_argument_and_variable(self, name, monkeypatch):
        if name != "backend":
            monkeypatch.setenv(ClientConfig.variables()[name], "")  # as good as unset
        assert getattr(local(), name) == ("local" if name == "backend" else FIELDS[name][0])

    @BY_FIELD
    def test_a_variable_overrides_the_default(self, name, monkeypatch):
        monkeypatch.setenv("KALM_BACKEND", "local")
        monkeypatch.setenv(ClientConfig.variables()[name], FIELDS[name][1])
        assert getattr(ClientConfig(), name) == FIELDS[name][2]

    @BY_FIELD
    def test_an_argument_overrides_a_variable_even_an_invalid_one(self, name, monkeypatch):
        _, variable, _, argument = FIELDS[name]
        for content in (variable, "not a {valid} value"):
            monkeypatch.setenv(ClientConfig.variables()[name], content)
            assert getattr(configured(**{name: argument}), name) == argument

    def test_variables_are_read_at_construction_only(self, monkeypatch):
        config = local()
        monkeypatch.setenv("KALM_BATCH_SIZE", "7")
        assert (config.batch_size, local().batch_size) == (128, 7)

    def test_a_callback_is_never_read_from_a_variable(self, monkeypatch):
        monkeypatch.setenv("KALM_ON_USAGE", "print")
        assert local().on_usage is None
        assert local(on_usage=print).on_usage is print

    @pytest.mark.parametrize(
        ("variable", "value"),
        [
            ("KALM_BATCH_SIZE", "many"),
            ("KALM_TIMEOUT", "soon"),
            ("KALM_EXPECTED_IDENTITY", "mine"),
            ("KALM_DIMENSIONS", "1024"),
            ("KALM_QUERY_INSTRUCTION", "web_serch"),
            ("KALM_MODAL_KEY", "id"),
            ("KALM_BASE_URL", "http://u:hunter2@there"),
        ],
    )
    def test_an_invalid_variable_is_named_without_its_value(self, variable, value, monkeypatch):
        monkeypatch.setenv(variable, value)
        with pytest.raises(ConfigurationError) as caught:
            local(backend="http" if "URL" in variable else "local")
        assert f"(from {variable})" in str(caught.value)
        assert "hunter2" not in str(caught.value)


class TestBackend:
    @pytest.mark.parametrize(
        "variables",
        [
            {"MODAL_TOKEN_ID": "ak", "MODAL_TOKEN_SECRET": "as"},
            {"MODAL_IS_REMOTE": "1"},
            {"MODAL_CONFIG_PATH": __file__},
        ],
    )
    def test_auto_is_modal_where_its_package_and_a_token_are(self, variables, monkeypatch):
        monkeypatch.delenv("MODAL_TOKEN_ID", raising=False)
        monkeypatch.setenv("MODAL_CONFIG_PATH", os.devnull)
        with pytest.raises(ConfigurationError, match="modal setup"):
            ClientConfig()
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        config = ClientConfig()
        assert config.resolved_backend == "modal"
        assert ClientConfig(backend="http").resolved_backend == "http"  # its URL is looked up
        monkeypatch.setattr("kalm_integrations.backends.find_spec", lambda _: None)
        assert config.resolved_backend == "modal"  # resolved once
        with pytest.raises(ConfigurationError, match="install modal"):
            ClientConfig()

    def test_auto_is_http_where_a_url_is_configured(self, monkeypatch):
        assert ClientConfig(base_url="http://there").resolved_backend == "http"
        monkeypatch.setenv("KALM_BASE_URL", "http://there")
        assert ClientConfig().resolved_backend == "http"
        assert local().resolved_backend == "local"

    @pytest.mark.parametrize("variable", ["", "auto"])
    def test_auto_is_never_the_embedded_engine_but_the_message_names_it(
        self, variable, monkeypatch
    ):
        monkeypatch.setenv("KALM_BACKEND", variable)
        with pytest.raises(ValueError, match="KALM_BACKEND=local"):
            ClientConfig()

    @pytest.mark.parametrize(
        ("url", "name"),
        [
            (None, "base_url="),
            ("there:8000", "base_url"),
            ("ftp://there", "base_url"),
            ("http://", "base_url"),
            ("http://there:port", ""),
            ("http://there/v1?key=1", "base_url"),
            ("http://me:hunter2@there", "api_key="),
        ],
    )
    def test_an_unusable_url_is_refused_without_its_credential(self, url, name):
        with pytest.raises(ConfigurationError) as caught:
            ClientConfig(backend="http", base_url=url)
        assert name in str(caught.value)
        assert "hunter2" not in str(caught.value)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"backend": "local", "base_url": "http://there"},
            {"backend": "local", "app_name": "mine"},
            {"backend": "modal", "base_url": "http://there"},
            {"base_url": "http://there", "class_name": "Mine"},
            {"transport": object(), "api_key": "k"},
            {"transport": object(), "backend": "local"},
        ],
    )
    @pytest.mark.parametrize("cls", CLASSES)
    def test_contradictory_arguments_are_refused_by_name(self, cls, arguments):
        with pytest.raises(ConfigurationError) as caught:
            cls(**arguments)
        assert all(f"{name}=" in str(caught.value) for name in arguments)

    def test_an_update_must_not_contradict_what_is_kept(self):
        with pytest.raises(ConfigurationError, match="base_url="):
            local().model_copy(update={"base_url": "http://there"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batchsize": 3}, "Did you mean batch_size?"),
        ({"model_kwargs": {}}, "model_kwargs"),
        ({"backend": "remote"}, "backend"),
        ({"model": "bge-m3"}, "model='bge-m3'"),
        ({"dimensions": 256}, "dimensions=256"),
        ({"dimensions": 0}, "dimensions=0"),
        ({"query_instruction": "web_serch"}, "query_instruction: "),
        ({"document_instruction": "web_serch"}, "'web_search'?"),
        ({"query_instruction": ""}, '"none"'),
        ({"document_instruction": "{title} {text}"}, "{title}"),
        ({"truncate": "start"}, "truncate"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2049}, "2048"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"max_concurrency": 257}, "256"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"max_retries": -1}, "max_retries"),
        ({"max_retries": 101}, "100"),
        ({"vector_dtype": "bfloat16"}, "vector_dtype"),
        ({"on_usage": "print"}, "on_usage"),
        ({"class_name": ""}, "class_name"),
        ({"modal_key": "id"}, "modal_secret"),
        ({"api_key": "a\nb"}, "api_key"),
        ({"expected_identity": "{"}, "kalm-fp8"),
        ({"expected_identity": "[]"}, "kalm-fp8"),
        ({"expected_identity": '{"model": "m"}'}, "attention"),
        ({"expected_identity": SPACE.to_dict() | {"profile": "1"}}, "profile"),
        ({"expected_identity": 7}, "SpaceIdentity"),
    ],
)
def test_an_invalid_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)) as caught:
        configured(**arguments)
    assert isinstance(caught.value, ValueError)


class TestRedaction:
    @pytest.mark.parametrize("name", ["api_key", "modal_key", "modal_secret"])
    def test_a_credential_is_never_shown_or_stored(self, name):
        pair = {"modal_key": "id-1234", "modal_secret": "secret-1234"}
        config = local(**(pair | {name: "hunter2"}))
        dumps = f"{config!r} {config} {config.model_dump()} {config.model_dump_json()}"
        assert "hunter2" not in dumps
        assert b"hunter2" not in pickle.dumps(config)
        with pytest.raises(ConfigurationError) as caught:
            local(**(pair | {name: "hunter2", "timeout": -1, "batch_size": "hunter2"}))
        assert "hunter2" not in str(caught.value)

    @pytest.mark.parametrize("cls", CLASSES)
    def test_repr_shows_arguments_that_differ_from_their_defaults(self, cls):
        model = cls(backend="local", timeout=7, batch_size=128, api_key="hunter2", on_usage=print)
        assert repr(model) == f"{cls.__name__}(backend='local', timeout=7.0)"

    def test_repr_shows_arguments_of_llama_index_too(self):
        model = llama_index.KalmModalEmbeddings(backend="local", num_workers=2)
        assert repr(model) == "KalmModalEmbeddings(backend='local', num_workers=2)"

    @pytest.mark.parametrize("cls", CLASSES)
    def test_repr_of_an_object_whose_constructor_has_raised(self, cls):
        assert repr(cls.__new__(cls)) == f"{cls.__name__}()"

    @BY_FIELD
    def test_settings_cannot_be_changed(self, name):
        config = local(api_key="k0")
        with pytest.raises(AttributeError, match=name) as caught:
            setattr(config, name, "hunter2")
        assert "hunter2" not in str(caught.value)
        assert config == local(api_key="k0")

    def test_an_updated_copy_is_validated(self):
        config = local(batch_size=7, api_key="k1")
        copied = config.model_copy(update={"truncate": "end", "timeout": 7})
        assert (copied.truncate, copied.batch_size, copied.timeout) == ("end", 7, 7.0)
        assert copied.api_key == SecretStr("k1")
        for invalid in ({"batch_size": 0}, {"query_instrution": "question"}, {"dimensions": 64}):
            with pytest.raises(ConfigurationError):
                config.model_copy(update=invalid)
        assert config.model_copy() == config

    def test_a_pickle_keeps_which_arguments_were_set(self, monkeypatch):
        config = local(batch_size=7, api_key="k1")
        pickled = pickle.dumps(config)
        monkeypatch.setenv("KALM_TIMEOUT", "7")  # only secrets are read where it is unpickled
        copied = pickle.loads(pickled)
        assert copied.model_fields_set == {"backend", "batch_size"}
        assert copied == config.model_copy(update={"api_key": None})


class TestDerived:
    def test_over_http_the_model_decides_what_is_expected(self):
        kalm = ClientConfig(base_url="http://there")
        assert kalm.served_model == "tencent/KaLM-Embedding-Gemma3-12B-2511"
        assert (kalm.query_template, kalm.vector_dimensions) == (prompts.RETRIEVAL, 3840)
        assert ClientConfig(base_url="http://there", dimensions=256).vector_dimensions == 256
        embedded = ClientConfig(base_url="http://there", model=SPACE.model)
        assert (embedded.expected_space, embedded.vector_dimensions) == (SPACE, 512)
        unknown = ClientConfig(base_url="http://there", model="some/model", dimensions=77)
        assert not unknown.expected_space.declared
        assert (unknown.query_template, unknown.vector_dimensions) == ("{text}", 77)

    @pytest.mark.parametrize(
        "value",
        [
            OTHER,
            OTHER.to_dict(),
            json.dumps(OTHER.to_dict()),
            VectorIdentity(space=OTHER, dimensions=512, document_template="{text}"),
        ],
    )
    def test_an_expected_identity_may_be_an_object_a_dict_or_json(self, value):
        assert local(expected_identity=value).expected_space == OTHER
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
    def test_documents_have_an_instruction_only_if_set_or_the_task_is_symmetric(
        self, arguments, query, document
    ):
        config = local(**arguments)
        assert (config.template("query"), config.template("document")) == (query, document)
        assert config.vector_identity == VectorIdentity(
            space=SPACE, dimensions=512, document_template=document
        )

    def test_request_limits_follow_the_batch_size_and_the_models_length(self):
        assert local(batch_size=9).request_limits == RequestLimits(texts=9, text_tokens=8192)


# Each changes document vectors: it needs a cache of its own.
CHANGES_DOCUMENTS: list[dict[str, Any]] = [
    {},
    {"document_instruction": "doc: {text}"},
    {"document_instruction": "web_search"},
    {"query_instruction": "sts"},
    {"query_instruction": "mteb:sts"},
    {"truncate": "end"},
    {"expected_identity": OTHER},
]
# The same document vectors, configured or fetched in another way.
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
    {"hedge": True},
    {"vector_dtype": "float32"},
    {"show_progress": True},
    {"on_usage": print},
]


class TestCacheNamespace:
    def test_every_argument_is_classified(self):
        names = {name for arguments in CHANGES_DOCUMENTS + KEEPS_DOCUMENTS for name in arguments}
        # "profile" stands for a model, and changes what that changes.
        assert names | {"backend", "transport", "profile"} == ClientConfig.model_fields.keys()

    def test_it_changes_with_document_vectors(self):
        namespaces = {local(**arguments).cache_namespace for arguments in CHANGES_DOCUMENTS}
        assert len(namespaces) == len(CHANGES_DOCUMENTS)

    @pytest.mark.parametrize("arguments", KEEPS_DOCUMENTS)
    def test_it_stays_the_same_with_the_same_document_vectors(self, arguments):
        assert configured(**arguments).cache_namespace == local().cache_namespace

    def test_a_preset_and_its_sentence_share_a_cache(self):
        sentence = prompts.PRESETS["web_search"].task
        by_name = local(document_instruction="web_search")
        assert by_name.cache_namespace == local(document_instruction=sentence).cache_namespace

    @pytest.mark.parametrize(
        ("arguments", "same"),
        [
            ({"query_instruction": "web_search"}, False),
            ({"truncate": "end"}, False),
            ({"expected_identity": OTHER}, False),
            ({"query_instruction": "none"}, True),
            ({"batch_size": 1}, True),
            ({"vector_dtype": "float32"}, True),
        ],
    )
    def test_that_of_queries_changes_with_query_vectors_only(self, arguments, same):
        namespace = local(**arguments).query_cache_namespace
        assert (namespace == local().query_cache_namespace) is same

    @pytest.mark.parametrize("instruction", ["none", "语言 {text}", "a/../b:\n{text}", "mteb:sts"])
    def test_it_is_safe_as_a_file_name_and_differs_between_roles(self, instruction):
        config = local(query_instruction=instruction, document_instruction=instruction)
        assert re.fullmatch(r"kalm-document-[A-Za-z0-9-]+", config.cache_namespace)
        assert re.fullmatch(r"kalm-query-[A-Za-z0-9-]+", config.query_cache_namespace)

    def test_it_is_the_same_in_every_release(self):
        assert local().cache_namespace == "kalm-document-628a8298b84359f4"


@pytest.mark.parametrize("cls", CLASSES)
class TestEveryClass:
    def test_white_space_around_a_url_is_removed(self, cls):
        made = cls(base_url=" http://there/v1 \r\n")
        assert getattr(made, "client", made).config.base_url == "http://there/v1"

    def test_it_may_be_compared_with_anything(self, cls):
        made = cls(base_url="http://there")
        assert made not in [None, "default", 1, [], object()]
        assert made in [None, made]


def test_the_arguments_have_a_json_schema():
    fields = ClientConfig.model_json_schema()["properties"]
    assert fields.keys() == {field.alias or n for n, field in ClientConfig.model_fields.items()}
