"""What docs/securing.md claims: its tests exist, and what can be read off the sources is so."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/securing.md").read_text()
SOURCES = [
    p for name in ("kalm_integrations", "modal_backend") for p in (ROOT / name).rglob("*.py")
]
LOADERS = {
    "pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "torch",
    "yaml",
}


HARMLESS = (
    ("cpu.py", {"torch"}),  # asks Linux for a processor's registers, and loads nothing
    ("quantize.py", {"torch"}),  # reads safetensors only
    ("embedded_process.py", {"pickle"}),  # talks to a child process over a socket pair
)


def test_every_test_that_it_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 5
    for path, function in named:
        assert f"def {function}" in (ROOT / path).read_text(), f"{path}::{function}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or ""]
            imported = {module.partition(".")[0] for module in modules}
            assert not LOADERS & imported or (path.name, imported) in HARMLESS
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec")
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            assert ast.unparse(node.value) == "False"


def decorated(name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The decorators of a function or class of the app: what is called, with which arguments."""
    for node in ast.walk(ast.parse((ROOT / "modal_backend/app.py").read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            for call in node.decorator_list:
                assert isinstance(call, ast.Call)
                named = {word.arg or "": ast.unparse(word.value) for word in call.keywords}
                yield ast.unparse(call.func), named


def test_who_gets_which_secret() -> None:
    service = dict(decorated("VLLMEmbeddingSnapshot"))["app.cls"]
    assert service["secrets"] == "api_key_secrets"
    for name in ("download_model_weights", "serve_http"):
        assert dict(decorated(name))["app.function"]["secrets"] == "hf_secrets"


def test_the_doors_of_the_app() -> None:
    assert dict(decorated("serve_http"))["modal.web_server"]["requires_proxy_auth"] == "True"
    door = dict(decorated("http"))["modal.asgi_app"]
    assert door["requires_proxy_auth"] == "settings.auth != 'bearer-public'"


def test_vllm_is_told_to_run_no_code_of_a_model() -> None:
    assert (
        '"trust_remote_code": False' in (ROOT / "modal_backend/engines/vllm/config.py").read_text()
    )
    assert "trust" not in (ROOT / "modal_backend/vllm_serve.py").read_text()
