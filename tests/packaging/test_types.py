"""Types as users see them: mypy and pyright, both strict and without plugins, read the snippets of
the documents and the examples against an installed wheel, and report wrong calls."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# Types of these libraries fail in strict mode, and a notebook's cell may await anything.
UNCHECKED = re.compile(r"^(import|from) (celery|chromadb|lancedb)\b|^\S.*\bawait ", re.M)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

CLASSES = {
    "client": "from kalm_integrations import KalmClient as Class",
    "langchain": "from kalm_integrations import KalmModalEmbeddings as Class",
    "llama_index": "from kalm_integrations.llama_index import KalmModalEmbeddings as Class",
}
WRONG_CALLS = {
    name: [
        "Class(batchsize=3)",
        "Class(batch_size='3')",
        "Class(backend='remote')",
        "Class(truncate='start')",
        "Class('kalm')",
        "Class(expected_identity=3)",
        "Class(on_usage=print, on_usag=print)",
        "Class(transport='http')",
        "Class(backend='local').with_options(batchsize=3)",
        "Class(backend='local').embed(['x'], role='question')",
        "Class(backend='local').embed(3)",
        "Class(backend='local').batch_size",
    ]
    for name in CLASSES
}
WRONG_CALLS["langchain"] += ["Class(client='http://there')", "Class(embed_batch_size=3)"]
WRONG_CALLS["llama_index"] += ["Class(client='http://there')", "Class(embed_batch_size='3')"]
RIGHT_CALLS = """
    import numpy as np
    from numpy.typing import NDArray
    from pydantic import SecretStr

    from kalm_integrations import ClientOptions, KalmClient, Transport, Usage
    from kalm_integrations import KalmModalEmbeddings as ForLangChain
    from kalm_integrations.llama_index import KalmModalEmbeddings as ForLlamaIndex
    from kalm_integrations.protocol import EmbedRequest, EmbedResponse, ServiceDescription

    options: ClientOptions = {"backend": "local", "truncate": "end"}
    used: list[Usage] = []
    KalmClient(**options)
    ForLangChain(**options)
    client = KalmClient(backend="local", api_key=SecretStr("key"), on_usage=used.append)
    ForLlamaIndex(backend="local", embed_batch_size=7, rate_limiter=None)
    vector: list[float] = ForLangChain(client=client).embed_query("x")
    array: NDArray[np.float32] = ForLlamaIndex(client=client).embed(["x"]).vectors


    class WithAttribute:
        can_be_cold = False

        async def embed(self, request: EmbedRequest) -> EmbedResponse:
            raise NotImplementedError

        async def ensure_ready(self) -> ServiceDescription | None:
            return None

        async def close(self) -> None:
            pass


    class WithProperty(WithAttribute):
        @property
        def can_be_cold(self) -> bool:  # type: ignore[override]  # pyright: ignore
            return True


    transports: list[Transport] = [WithAttribute(), WithProperty()]
    KalmClient(transport=WithAttribute())
"""
# Of third-party libraries without complete types: no snippet can know what those return. That our
# own are complete is checked below.
THEIRS = ("reportMissingTypeStubs", "reportUnknown")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in a new environment, which finds other packages where this one does."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run(
        [sys.executable, "-m", "uv", "build", "--quiet", "--wheel", "--out-dir", folder, ROOT],
        check=True,
    )
    venv.create(folder / "venv", symlinks=True)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # Without `.pth` files of their own, such as the one that leads to this tree.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "venv"


@pytest.fixture(scope="module")
def reports(environment: Path) -> dict[str, list[str]]:
    """What each checker says, one message a line: `file:line: message`."""
    sources = environment.parent / "sources"
    sources.mkdir()
    for page in PAGES:
        for block in re.finditer(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
            if UNCHECKED.search(block[1]):
                continue
            line = page.read_text()[: block.start()].count("\n") + 1
            (sources / f"{page.stem.replace('-', '_')}_{line}.py").write_text(block[1])
    for example in EXAMPLES:
        (sources / example.name).write_text(example.read_text())
    for name, calls in WRONG_CALLS.items():
        (sources / f"wrong_{name}.py").write_text("\n".join([CLASSES[name], *calls]) + "\n")
    (sources / "right.py").write_text(dedent(RIGHT_CALLS))
    names = [path.name for path in sorted(sources.iterdir())]
    running = {
        "mypy": _mypy(environment, sources, names),
        "pyright": _pyright(environment, sources),
    }
    return {checker: list(report) for checker, report in running.items()}


def _mypy(environment: Path, sources: Path, names: list[str]) -> Iterator[str]:
    cache = ROOT / ".mypy_cache" / "snippets"  # of libraries, mostly: they take a minute
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary"]
    options = ["--python-executable", environment / "bin/python", "--cache-dir", cache]
    done = subprocess.run(
        [*command, *options, "--hide-error-context", *names],
        check=False,
        capture_output=True,
        text=True,
        cwd=sources,
    )
    assert done.returncode < 2, done.stdout + done.stderr
    for line in done.stdout.splitlines():
        if ": error: " in line and "[import-untyped]" not in line:
            yield line.replace(": error", "", 1)


def _pyright(environment: Path, sources: Path) -> Iterator[str]:
    settings = {"typeCheckingMode": "strict", "venvPath": str(environment.parent), "venv": "venv"}
    (sources / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--project", sources]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode < 2, done.stdout + done.stderr
    for each in json.loads(done.stdout)["generalDiagnostics"]:
        if each["severity"] == "error" and not each.get("rule", "").startswith(THEIRS):
            line = each["range"]["start"]["line"] + 1
            message = each["message"].splitlines()[0]
            yield f"{Path(each['file']).name}:{line}: {message}"


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_snippets_examples_and_right_calls_pass(
    reports: dict[str, list[str]], checker: str
) -> None:
    assert [line for line in reports[checker] if not line.startswith("wrong_")] == []


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_wrong_calls_are_reported(reports: dict[str, list[str]], checker: str, name: str) -> None:
    reported = {line.split(": ")[0] for line in reports[checker]}
    unreported = [
        call
        for number, call in enumerate(WRONG_CALLS[name], start=2)
        if f"wrong_{name}.py:{number}" not in reported
    ]
    assert unreported == []


def test_no_public_type_is_unknown(environment: Path) -> None:
    command = [sys.executable, "-m", "pyright", "--verifytypes", "kalm_integrations"]
    done = subprocess.run(
        [*command, "--ignoreexternal", "--outputjson"],
        check=False,  # it fails, because some types are inferred
        capture_output=True,
        text=True,
        cwd=environment.parent,
        env=os.environ | {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}"},
    )
    report = json.loads(done.stdout)["typeCompleteness"]
    assert report["exportedSymbolCounts"]["withKnownType"] > 1000
    unknown = [
        symbol["name"]
        for symbol in report["symbols"]
        if symbol["isExported"]
        and not symbol["isTypeKnown"]
        and not symbol["isTypeAmbiguous"]
        # Its base class is mteb's, which is not installed here.
        and not symbol["name"].startswith("kalm_integrations.mteb.")
    ]
    assert unknown == []
