"""The distributions that are built from this tree, and each extra, installed alone.

Each environment is new: a venv without even pip, with the wheel, one extra, and their
requirements. Two extras are not installed here: `vllm` is 2 GB and wants CUDA, so only its pin is
compared; `dev` is the environment that runs this.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from importlib.metadata import requires
from pathlib import Path
from textwrap import dedent

import pytest
from modal_emulator import Emulator
from programs import KEY, TEXTS, local, over_http

from kalm_integrations.models import EMBEDDED
from kalm_integrations.version import __version__
from modal_backend import image
from modal_backend.engines.registry import ENGINES

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME, EXTRAS = PROJECT["name"], PROJECT["optional-dependencies"]
PACKAGES = ("kalm_integrations", "modal_backend")
STEM = f"{NAME.replace('-', '_')}-{__version__}"
INSTALLED = (
    *("", "langchain", "llama-index", "local", "modal", "bulk", "eval", "server", "quickstart"),
)
SMALL = EMBEDDED.space.model
OURS = ("PYTHON", "KALM_", "MODAL_", "OPENAI_")


def outside(**variables: str) -> dict[str, str]:
    """Variables for a program: none of this process's for Python and us, and these."""
    theirs = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return theirs | variables


def run(
    command: Sequence[str | Path], cwd: Path, status: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=outside(**variables),
        timeout=300,
    )
    assert done.returncode == status, f"{command}\n{done.stdout}{done.stderr}"
    return done


@dataclass
class Built:
    """`python -m build`: the source distribution, and a wheel from it, as pip makes one."""

    sdist: Path
    wheel: Path
    straight: Path
    """A wheel from the tree itself."""

    def in_sdist(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {name.removeprefix(f"{STEM}/") for name in archive.getnames()}

    def metadata(self) -> Message:
        return message_from_bytes(files(self.wheel)[f"{STEM}.dist-info/METADATA"])


def files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    python = [sys.executable, "-m"]
    # With uv in pip's place, for its speed, here and below.
    run([*python, "build", "--installer", "uv", "--outdir", folder / "dist", ROOT], folder)
    run([*python, "uv", "build", "--wheel", "--out-dir", folder / "straight", ROOT], folder)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    (straight,) = (folder / "straight").glob("*.whl")
    return Built(sdist, wheel, straight)


@dataclass
class Environment:
    """A new environment, and an empty home to run its programs in."""

    folder: Path
    home: Path

    def install(self, *requirements: str | Path) -> None:
        uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet"]
        # Copies: nltk, below LlamaIndex, refuses to read files with hard links.
        options = ["--python", self.folder / "bin/python", "--link-mode", "copy"]
        run([*uv, *options, *requirements], self.home)

    def python(self, code: str, *, status: int = 0, **variables: str) -> list[str]:
        """What a program prints; where it has to fail, the last line of why."""
        command = [self.folder / "bin/python", "-W", "error", "-c", dedent(code)]
        done = run(command, self.home, status, HOME=str(self.home), **variables)
        # A slow start depends on this machine; any other line is a warning.
        warnings = [line for line in done.stderr.splitlines() if "may be starting" not in line]
        assert status or not warnings
        return (done.stderr.splitlines()[-1:] if status else []) + done.stdout.splitlines()

    def kalm(self, *arguments: str | Path, status: int = 0, **variables: str) -> str:
        """All that the command shows."""
        variables = {"HOME": str(self.home), "COLUMNS": "200"} | variables
        done = run([self.folder / "bin/kalm", *arguments], self.home, status, **variables)
        return done.stdout + done.stderr


class Environments:
    """One for each extra; two are created at a time, while tests run in those that are ready."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._environments: dict[str, Future[Environment]] = {
            extra: self._pool.submit(self._create, folder / (extra or "core"), extra, wheel)
            for extra in INSTALLED
        }

    @staticmethod
    def _create(folder: Path, extra: str, wheel: Path) -> Environment:
        environment = Environment(folder / "venv", folder / "home")
        environment.home.mkdir(parents=True)
        venv.create(environment.folder, symlinks=True)
        environment.install(f"{wheel}[{extra}]" if extra else wheel)
        return environment

    def __getitem__(self, extra: str) -> Environment:
        return self._environments[extra].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def environments(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environments]:
    environments = Environments(tmp_path_factory.mktemp("environments"), built.wheel)
    yield environments
    environments.close()


@pytest.fixture
def service() -> Iterator[Mapping[str, str]]:
    """The variables that lead a client to a server in this process, and to what it must get."""
    with over_http() as service:
        yield service.environment


class TestBuilt:
    def test_the_wheel_has_both_packages_typed_and_nothing_else(self, built: Built) -> None:
        sources = {
            path.relative_to(ROOT).as_posix()
            for package in PACKAGES
            for path in (ROOT / package).rglob("*")
            if path.suffix in (".py", ".txt", ".json") or path.name == "py.typed"
        }
        assert {f"{package}/py.typed" for package in PACKAGES} <= sources
        about = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
        assert files(built.wheel).keys() == sources | {f"{STEM}.dist-info/{it}" for it in about}

    def test_the_sources_of_the_wheel_are_those_of_the_tree(self, built: Built) -> None:
        for name, content in files(built.wheel).items():
            if not name.startswith(STEM):
                assert content == (ROOT / name).read_bytes(), name
        licence = files(built.wheel)[f"{STEM}.dist-info/licenses/LICENSE"]
        assert licence == (ROOT / "LICENSE").read_bytes()

    def test_the_wheel_is_the_same_from_the_sdist_and_from_the_tree(self, built: Built) -> None:
        assert built.wheel.name == built.straight.name == f"{STEM}-py3-none-any.whl"
        assert files(built.wheel) == files(built.straight)

    @pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only git knows what is ours")
    def test_the_sdist_has_all_files_of_git(self, built: Built) -> None:
        def listed(*options: str) -> set[str]:
            names = run(["git", "ls-files", "-z", *options], ROOT).stdout.split("\0")
            return {name for name in names if name and (ROOT / name).exists()}

        assert listed() - built.in_sdist() == set()
        added = listed("--others", "--exclude-standard")  # not yet told to git
        assert built.in_sdist() - listed() - added == {"PKG-INFO"}

    def test_the_metadata(self, built: Built) -> None:
        about = built.metadata()
        assert (about["Name"], about["Version"]) == (NAME, __version__)
        assert about["License-Expression"] == "Apache-2.0"
        assert about.get_all("License-File") == ["LICENSE"]
        assert about["Requires-Python"] == PROJECT["requires-python"]
        assert about["Description-Content-Type"] == "text/markdown"
        payload = about.get_payload(decode=True)
        assert isinstance(payload, bytes)
        links = re.findall(r"\]\(([^)]+)\)", payload.decode())
        assert links
        assert [link for link in links if not link.startswith(("https://", "#"))] == []
        assert f"]({PROJECT['urls']['Repository']}/blob/main/docs/tutorial.md)" in payload.decode()
        assert set(about.get_all("Provides-Extra", [])) == EXTRAS.keys()

    def test_a_changelog_for_this_version(self) -> None:
        first = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
        assert first is not None
        assert first[1].split()[0] == __version__
        assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()

    def test_packages_that_decide_vectors_are_pinned_as_in_the_container(self) -> None:
        (vllm,) = EXTRAS["vllm"]
        assert vllm in image.VLLM
        tested = (ROOT / "tests/vllm/requirements.txt").read_text().splitlines()
        assert vllm.replace("==", "-cpu==") in tested
        assert EXTRAS["local"] == list(ENGINES["embedded"].packages)

    def test_every_extra_is_tested(self) -> None:
        # "quantize" and "vllm" bring torch: tests/vllm has an environment of its own for them. The
        # what needs the others is tested with "dev", which includes them; `make docs` and
        # `make docs-test` have those for contributors.
        frameworks = {"haystack", "chroma", "lancedb"}
        others = {"quantize", "vllm", "socks", "otel", "dev", "docs", "docs-test"}
        assert {*INSTALLED, *frameworks, *others} == {"", *EXTRAS}
        assert any("extra == 'dev'" in each.replace('"', "'") for each in requires(NAME) or [])


class TestCoreAlone:
    @pytest.fixture
    def core(self, environments: Environments) -> Environment:
        return environments[""]

    def test_the_command(self, core: Environment) -> None:
        assert core.kalm("--version") == f"{NAME} {__version__}\n"
        assert re.search(r"quickstart +Index real text", core.kalm("--help"))
        assert "A100-40GB" in core.kalm("cost")
        assert '"name": "packages",\n      "status": "ok"' in core.kalm(
            "doctor", "--json", status=1
        )

    def test_numpy_over_http(self, core: Environment, service: Mapping[str, str]) -> None:
        code = f"""
            import contextlib, io, numpy, os
            from kalm_integrations import KalmClient

            with contextlib.redirect_stderr(io.StringIO()) as bar:
                with KalmClient(show_progress=True) as client:
                    vectors = client.embed({TEXTS}).vectors
            print(numpy.allclose(vectors, numpy.load(os.environ["EXPECTED"]), atol=1e-3))
            print("{len(TEXTS)}/{len(TEXTS)}" in bar.getvalue())
        """
        assert core.python(code, **service) == ["True", "True"]

    @pytest.mark.parametrize(
        ("code", "extra"),
        [
            ("from kalm_integrations import KalmModalEmbeddings", "langchain"),
            ("from kalm_integrations.llama_index import KalmModalEmbeddings", "llama-index"),
            ("import kalm_integrations.haystack", "haystack"),
            ("import kalm_integrations.chroma", "chroma"),
            ("import kalm_integrations.lancedb", "lancedb"),
            ("from kalm_integrations import *; KalmClient(backend='local').embed(['x'])", "local"),
            ("from kalm_integrations import *; KalmClient(backend='modal').embed(['x'])", "modal"),
        ],
    )
    def test_code_that_needs_an_extra_names_it(
        self, core: Environment, code: str, extra: str
    ) -> None:
        (error,) = core.python(code.replace("*", "KalmClient"), status=1)
        assert f" pip install '{NAME}[{extra}]'." in error

    @pytest.mark.parametrize(
        ("command", "extra"),
        [
            ("quickstart", "quickstart"),
            ("serve", "server,local"),
            ("serve --engine vllm", "server,vllm"),
            ("deploy", "modal"),
            ("eval compare local local --corpus .", "eval"),
        ],
    )
    def test_a_command_that_needs_an_extra_names_it(
        self, core: Environment, command: str, extra: str
    ) -> None:
        output = core.kalm(*command.split(), status=1, KALM_API_KEY=KEY)
        verb = command.split(maxsplit=1)[0]
        needs = f"Run pip install '{NAME}[{extra}]'\n"
        assert re.fullmatch(rf"kalm {verb}.*: .*{re.escape(needs)}", output)


class TestEachExtraAlone:
    def test_langchain(self, environments: Environments, service: Mapping[str, str]) -> None:
        code = f"""
            from langchain_core.vectorstores import InMemoryVectorStore
            from kalm_integrations import KalmModalEmbeddings

            store = InMemoryVectorStore(KalmModalEmbeddings())
            store.add_texts({TEXTS})
            print(store.similarity_search("text 7", k=1)[0].page_content)
        """
        assert environments["langchain"].python(code, **service) == ["text 7"]

    def test_llama_index(self, environments: Environments, service: Mapping[str, str]) -> None:
        code = f"""
            from llama_index.core import Document, Settings, VectorStoreIndex
            from kalm_integrations.llama_index import KalmModalEmbeddings

            Settings.embed_model = KalmModalEmbeddings()
            index = VectorStoreIndex.from_documents([Document(text=text) for text in {TEXTS}])
            print(index.as_retriever(similarity_top_k=1).retrieve("text 7")[0].text)
        """
        assert environments["llama-index"].python(code, **service) == ["text 7"]

    def test_local(self, environments: Environments) -> None:
        code = f"""
            import numpy, os, threadpoolctl
            from kalm_integrations import KalmClient

            vectors = KalmClient(backend="local").embed({TEXTS}).vectors
            print(numpy.allclose(vectors, numpy.load(os.environ["EXPECTED"]), atol=1e-3))
        """
        with local() as service:
            assert environments["local"].python(code, **service.environment) == ["True"]
            output = environments["local"].kalm("doctor", "--wake", **service.environment)
        assert "All good" in output

    def test_modal(self, environments: Environments) -> None:
        """To a local stand-in for Modal's cloud, with the real Modal client."""
        alone = environments["modal"]
        assert "Run `modal setup`" in alone.kalm("deploy", "--engine", "embedded", status=1)
        with Emulator() as cloud:
            output = alone.kalm("deploy", "--engine", "embedded", **cloud.client_env)
            snippet = "\n".join(re.findall(r"^    (.*)$", output.partition("over RPC:")[2], re.M))
            assert "KalmClient(" in snippet
            (vector,) = alone.python(snippet, **cloud.client_env)
        assert vector.count(",") == 2

    def test_bulk(self, environments: Environments, service: Mapping[str, str]) -> None:
        alone = environments["bulk"]
        (alone.home / "in.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
        output = alone.kalm("embed", "in.jsonl", "--output", "out", **service)
        assert f"{len(TEXTS)} rows in 1 shard," in output
        code = """
            from kalm_integrations.bulk import read

            print([rows.vectors.shape for rows in read("out")])
        """
        assert alone.python(code) == [f"[({len(TEXTS)}, 512)]"]

    def test_eval(
        self, environments: Environments, service: Mapping[str, str], tmp_path: Path
    ) -> None:
        rows = [json.dumps({"_id": str(row), "text": text}) for row, text in enumerate(TEXTS)]
        (tmp_path / "corpus.jsonl").write_text("\n".join(rows))
        rows = [json.dumps({"_id": f"q{row}", "text": text}) for row, text in enumerate(TEXTS)]
        (tmp_path / "queries.jsonl").write_text("\n".join(rows))
        (tmp_path / "qrels").mkdir()
        judgments = "\n".join(f"q{row}\t{row}\t1" for row in range(len(TEXTS)))
        (tmp_path / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judgments}")
        options = ("--plot", tmp_path / "plot.png")
        shown = environments["eval"].kalm("eval", "retrieval", tmp_path, *options, **service)
        assert "1.000 [1.000, 1.000]" in shown
        assert (tmp_path / "plot.png").is_file()

    def test_server_with_any_engine(self, environments: Environments) -> None:
        """`serving.py` and `scripted_engine.py` of the tests need no more than the extra."""
        code = """
            from kalm_integrations import KalmClient
            from modal_backend.http.app import create_app
            from modal_backend.http.auth import BearerKeys
            from modal_backend.service import EmbeddingService
            from pydantic import SecretStr
            from scripted_engine import ScriptedEngine
            from serving import serving

            service = EmbeddingService(ScriptedEngine())
            with serving(create_app(service, keys=BearerKeys([SecretStr("correct-horse")]))) as url:
                with KalmClient(base_url=url, api_key="correct-horse",
                                model=ScriptedEngine.identity.model) as client:
                    print(client.embed(["x", "y"]).vectors.shape)
        """
        output = environments["server"].python(code, PYTHONPATH=str(ROOT / "tests"))
        assert output == ["(2, 512)"]

    def test_server_then_local_as_the_message_suggests(
        self, environments: Environments, built: Built
    ) -> None:
        alone = environments["server"]
        output = alone.kalm("serve", "--insecure-no-auth", status=1)
        named = re.search(r"pip install '(.*?)'", output)
        assert named is not None
        alone.install(named[1], "--find-links", built.wheel.parent)
        with subprocess.Popen(
            [alone.folder / "bin/kalm", "serve", "--port", "0", "--insecure-no-auth"],
            cwd=alone.home,
            env=outside(),
            stderr=subprocess.PIPE,
            text=True,
        ) as server:
            assert server.stderr is not None
            ready = next(line for line in server.stderr if "kalm serve: ready: " in line)
            url = ready.split(" on ")[-1].strip()
            output = alone.kalm("doctor", "--wake", KALM_BASE_URL=url, KALM_MODEL=SMALL)
            server.terminate()
        assert "All good" in output

    def test_quickstart(self, environments: Environments) -> None:
        page = ROOT / "tests" / "modal" / "modal_emulator"  # one, for the packages are what counts
        output = environments["quickstart"].kalm("quickstart", "--corpus", page)
        assert "LangChain (QdrantVectorStore)" in output
        assert "LlamaIndex (VectorStoreIndex)" in output
