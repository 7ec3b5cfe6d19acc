import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kalm_integrations import quickstart
from kalm_integrations.cli import main
from kalm_integrations.install_hints import install_command
from kalm_integrations.quickstart import Outcome, corpus, docstrings, folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def as_a_user_sees_it(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("MAKELEVEL", raising=False)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    files = {
        "bread.md": "# Baking **bread**\n\nMix flour, water and salt; bake it for an hour.\n",
        "cats/cats.rst": "Keeping cats\n============\n\nA cat sleeps most of the day.\n",
        "cats/.hidden/secret.md": "# Secret\n",
        "node_modules/module/README.md": "# Not mine\n",
        "notes.txt": "\n  The train leaves at noon.  \x1b[2J\n",
        "empty.md": " \n",
        "picture.png": "not text",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    return tmp_path


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {text.name: text.content for text in docstrings.read().texts}


class TestDocstrings:
    def test_there_are_enough(self, texts: dict[str, str]) -> None:
        assert 2000 <= len(texts) <= 3500

    def test_names_are_those_one_would_import(self, texts: dict[str, str]) -> None:
        assert all(re.fullmatch(r"[a-zA-Z]\w*(\.[a-zA-Z]\w*)*", name) for name in texts)
        assert {name.split(".")[0] for name in texts}.isdisjoint({"test", "idlelib", "tkinter"})
        assert texts.keys() >= {
            "collections.Counter",
            "concurrent.futures.Future.result",
            "datetime.datetime.strptime",
            "io.open",
            "json.dumps",
            "os.path.commonpath",
            "pathlib.Path.open",
            "shutil.copytree",
        }

    def test_texts_are_name_and_docstring(self, texts: dict[str, str]) -> None:
        import statistics

        name, _, beginning = texts["statistics.median"].partition("\n\n")
        assert name == "statistics.median"
        assert (statistics.median.__doc__ or "").startswith(beginning[:40])

    def test_expected_hits_are_in_it(self, texts: dict[str, str]) -> None:
        for question in docstrings.QUESTIONS:
            assert question.expected
            assert question.expected <= texts.keys()

    def test_without_sources(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
        assert main(["quickstart"]) == 2


def outcome(docs: Path, question: str | None = None) -> Outcome:
    *_, last = quickstart.run(docs, question)
    assert isinstance(last, Outcome)
    return last


class TestDocs:
    def test_each_heading_finds_its_file_in_both_frameworks(self, documents: Path) -> None:
        result = outcome(documents)
        asked = [question.text for question in result.corpus.questions]
        assert (asked[0], asked[2]) == ("Baking bread", "Keeping cats")
        assert asked[1].startswith("The train leaves at noon.")
        assert [name.split()[0] for name in result.hits] == ["LangChain", "LlamaIndex"]
        for hits in result.hits.values():
            best = [answers[0].name for answers in hits]
            assert best == ["bread.md", "notes.txt", "cats/cats.rst"]

    def test_files_that_are_left_out_are_reported(self, documents: Path) -> None:
        origin = folder.read(documents).origin
        assert "latin.txt (not UTF-8)" in origin
        assert "1 × .png" in origin
        assert "secret" not in origin

    def test_each_hit_is_printed_once(
        self, documents: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        question = """What's a "cat" doing for [bold]$5[/bold] \\ all day?"""
        assert main(["quickstart", "--corpus", str(documents), "--question", question]) == 0
        printed, errors = capsys.readouterr()
        assert errors == ""
        assert printed.count(question) == 1
        assert len(re.findall(r"│ +cats/cats.rst  ", printed)) == 1
        assert "\x1b" not in printed

    def test_vectors_are_kept_until_a_text_changes(self, documents: Path) -> None:
        assert "embedded" in outcome(documents).vectors
        again = outcome(documents, "What do cats do?")
        assert "embedded" not in again.vectors
        assert all(hits[0][0].name == "cats/cats.rst" for hits in again.hits.values())
        (documents / "new.md").write_text("# Rivers\n\nThe Nile flows north.\n")
        changed = outcome(documents, "Where does the Nile flow?")
        assert "embedded" in changed.vectors
        assert all(hits[0][0].name == "new.md" for hits in changed.hits.values())

    @pytest.mark.parametrize("content", [b"", b"not an archive"])
    def test_a_broken_cache_is_replaced(self, documents: Path, content: bytes) -> None:
        outcome(documents)
        (kept,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("*.npz")
        kept.write_bytes(content)
        assert "embedded" in outcome(documents).vectors
        assert "embedded" not in outcome(documents).vectors

    def test_a_cache_that_cannot_be_written_is_no_failure(
        self, documents: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
        assert "not kept" in outcome(documents).vectors

    @pytest.mark.parametrize("content", [None, b"", b"caf\xe9"])
    def test_nothing_to_index(
        self, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        if content is not None:
            (tmp_path / "file.md").write_bytes(content)
        assert main(["quickstart", "--corpus", str(tmp_path)]) == 2
        shown, errors = capsys.readouterr()
        assert shown.strip() == ""
        assert f"{tmp_path} has no text in files named *.md, *.markdown, *.rst, *.txt" in errors
        assert ("file.md (not UTF-8)" in errors) == (content == b"caf\xe9")

    def test_a_file_is_no_folder(self, documents: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["quickstart", "--corpus", str(documents / "notes.txt")]) == 2
        assert "notes.txt is a file: name the folder that it is in" in capsys.readouterr().err

    def test_no_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["quickstart", "--corpus", str(tmp_path / "missing")]) == 2
        assert "missing" in capsys.readouterr().err

    def test_too_much(
        self, documents: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(folder, "MOST_CHUNKS", 2)
        assert main(["quickstart", "--corpus", str(documents)]) == 2
        assert "name a smaller folder" in capsys.readouterr().err

    def test_questions_are_spread_over_the_folder(self, tmp_path: Path) -> None:
        for number in range(9):
            (tmp_path / f"{number}.md").write_text(f"# Heading {number}\n\n## Another\n\ntext")
        asked = [question.text for question in folder.read(tmp_path).questions]
        assert asked == ["Heading 0", "Heading 3", "Heading 6"]

    @pytest.mark.parametrize(
        ("document", "asked"),
        [
            ("# One\n\n```sh\n# code\n```\n## [Two](http://x)\n\n# One\n", ["One", "Two"]),
            ("Title\n=====\n\ntext\n\nPart\n----\n", ["Title", "Part"]),
            ("---\n\nfirst line\nsecond line\n", ["first line"]),
            ("字" * 200_000, ["字" * 100]),
            ("!!!", ["!!!"]),
        ],
    )
    def test_questions_of_one_file(self, document: str, asked: list[str], tmp_path: Path) -> None:
        (tmp_path / "a.md").write_text(document)
        assert [question.text for question in folder.read(tmp_path).questions] == asked


def test_wrong_hits_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [corpus.Text(name, f"{name} is a thing") for name in ("bread", "cat", "train", "tree")]
    questions = [
        corpus.Question("Tell me about the cat", expected=frozenset({"cat"})),
        corpus.Question("Tell me about the train", expected=frozenset({"nothing"})),
        corpus.Question("Tell me about the tree", expected=frozenset({"nothing"})),
    ]
    wrong = corpus.Corpus(texts, "four", "four things", questions, "made up")
    monkeypatch.setattr(docstrings, "read", lambda: wrong)
    assert main(["quickstart"]) == 1
    assert len(re.findall("✗ .* 1 of 3", capsys.readouterr().out)) == 2


class TestCommand:
    def test_an_empty_question(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["quickstart", "--question", " "]) == 2
        assert "the question is empty" in capsys.readouterr().err

    def test_a_wrong_setting(
        self, monkeypatch: pytest.MonkeyPatch, documents: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("KALM_DIMENSIONS", "7")
        assert main(["quickstart", "--corpus", str(documents)]) == 2
        assert "dimensions=7" in capsys.readouterr().err

    @pytest.mark.parametrize("missing", ["langchain_qdrant", "llama_index.core"])
    def test_a_missing_extra(self, missing: str, documents: Path) -> None:
        program = (
            f"import sys; sys.modules[{missing!r}] = None\n"
            "from kalm_integrations import cli\n"
            f"sys.exit(cli.main(['quickstart', '--corpus', {str(documents)!r}]))"
        )
        done = run(sys.executable, "-c", program)
        assert done.returncode == 1
        assert install_command("quickstart") in done.stderr
        assert "Traceback" not in done.stderr


class TestMake:
    @pytest.fixture
    def installed(self, tmp_path: Path) -> Path:
        """A tree whose `.venv` is up to date, and whose `kalm` prints its arguments."""
        shutil.copy(ROOT / "Makefile", tmp_path)
        (tmp_path / "pyproject.toml").touch()
        commands = tmp_path / ".venv" / "bin"
        commands.mkdir(parents=True)
        kalm = commands / "kalm"
        kalm.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\n")
        kalm.chmod(0o755)
        for stamp in (".made", ".quickstart"):
            (commands.parent / stamp).touch()
        return tmp_path

    @pytest.mark.parametrize(
        "question",
        [
            """What's "it" called?""",
            "$5 or $(HOME) or $$ or ${x",
            "`date` \\ ; # & | > < * ?",
            "$(shell touch made-by-make)",
            "--help",
            "如何打开",
        ],
    )
    def test_arguments_arrive_as_typed(self, question: str, installed: Path) -> None:
        done = make(installed, "-j4", "quickstart", f"Q={question}", "DOCS=my notes/it's here")
        arguments = ["quickstart", "--corpus=my notes/it's here", f"--question={question}"]
        assert done.stdout == f"{arguments}\n"
        assert not (installed / "made-by-make").exists()

    def test_no_arguments(self, installed: Path) -> None:
        assert make(installed, "quickstart").stdout == "['quickstart']\n"

    @pytest.mark.parametrize(
        ("python", "message"),
        [
            ("no-such-python", "no-such-python is missing or older than 3.11"),
            ("./old", "./old is missing or older than 3.11"),
            ("./bare", "./bare lacks venv or pip"),
        ],
    )
    def test_an_unfit_python(self, python: str, message: str, installed: Path) -> None:
        (installed / ".venv" / ".made").unlink()
        for name, test in {"old": "false", "bare": '[ "${2#*venv}" = "$2" ]'}.items():
            (installed / name).write_text(f"#!/bin/sh\n{test}\n")
            (installed / name).chmod(0o755)
        done = make(installed, "quickstart", f"PYTHON={python}")
        assert done.returncode == 2
        assert message in done.stderr


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    outer = {"MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"}
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    return run("make", *arguments, environment=environment, folder=folder)


def run(
    *command: str, environment: dict[str, str] | None = None, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False
    )
