"""Commands of README and docs/arguments.md run as they are; those of CONTRIBUTING.md exist."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kalm_integrations.models import EMBEDDED
from kalm_integrations.quickstart import docstrings, folder

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ARGUMENTS = (ROOT / "docs/arguments.md").read_text()


def commands(page: str) -> list[str]:
    blocks = re.findall(r"^ *```bash\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


COMMANDS = commands(README) + commands(ARGUMENTS)
QUICKSTARTS = [command for command in COMMANDS if command.startswith("make quickstart")]
SERVES = [command for command in COMMANDS if "kalm serve" in command]
INSTALLS = [command for command in COMMANDS if command.startswith("pip install")]
CONTRIBUTING = commands((ROOT / "CONTRIBUTING.md").read_text())


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """The running environment, as make finds it after an installation."""
    (tmp_path / "bin").symlink_to(Path(sys.executable).parent)
    for stamp in (".made", ".quickstart"):
        (tmp_path / stamp).touch()
    return tmp_path


def run(command: str, *, quiet: bool = True) -> str:
    outside = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        shlex.split(command), check=False, capture_output=True, text=True, cwd=ROOT, env=outside
    )
    assert done.returncode == 0, done.stderr
    assert not (quiet and done.stderr)
    return done.stdout


def test_no_command_is_forgotten() -> None:
    assert {*QUICKSTARTS, *INSTALLS, *SERVES} == set(COMMANDS)
    ci = (ROOT / ".ci" / "run").read_text().splitlines()  # what runs this
    assert [line for line in ci if line in CONTRIBUTING] == ["make test", "make test-vllm"]


def test_make_quickstart(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one run over all the docstrings of the standard library."""
    assert QUICKSTARTS[0] == "make quickstart"
    monkeypatch.setenv("XDG_CACHE_HOME", str(venv / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    shown = run(f"make quickstart VENV={venv}")
    assert EMBEDDED.space.model.rpartition("/")[2] in shown
    assert "It is not KaLM" in shown
    for framework in ("LangChain", "LlamaIndex"):
        assert re.search(rf"✓ {framework} .*: [23] of 3 questions", shown)
    for question in docstrings.QUESTIONS:
        assert shown.count(question.text) == 1
    assert 'make quickstart Q="' in shown
    # What the README shows of it, but for scores, which another Python's docstrings may change.
    (block,) = re.findall(r"```text\n(Engine .*?)```", README, re.DOTALL)
    lines = {line.rstrip() for line in shown.splitlines()}
    missing = [line for line in block.splitlines() if line not in lines]
    assert all(re.search(r"│ 0\.\d{3} │$", line) for line in missing)


@pytest.mark.parametrize("command", QUICKSTARTS[1:])
def test_make_quickstart_hands_on_what_it_is_given(command: str, tmp_path: Path) -> None:
    """test_quickstart.py runs what arrives."""
    kalm = tmp_path / "bin" / "kalm"
    kalm.parent.mkdir()
    kalm.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\n")
    kalm.chmod(0o755)
    for stamp in (".made", ".quickstart"):
        (tmp_path / stamp).touch()
    _, _, argument = shlex.split(command)
    name, _, value = argument.partition("=")
    option = {"Q": "--question", "DOCS": "--corpus"}[name]
    assert run(f"{command} VENV={tmp_path}") == f"{['quickstart', f'{option}={value}']}\n"
    assert name != "DOCS" or folder.read(ROOT / value).texts


@pytest.mark.parametrize("command", INSTALLS)
def test_pip_install(command: str) -> None:
    """With uv, which looks for the same packages in a tenth of the time."""
    python = shlex.quote(sys.executable)
    uv = command.replace("pip", f"{python} -m uv pip", 1).replace("install", "install --dry-run", 1)
    run(f"{uv} --python {python}", quiet=False)


@pytest.mark.parametrize("command", CONTRIBUTING)
def test_a_contributors_command_is_there(command: str) -> None:
    """Not run: `make test` runs this, and tests/packaging builds."""
    program, *arguments = shlex.split(command)
    assert all((ROOT / path).exists() for path in arguments if path.startswith("tests/"))
    if program == "make":
        run(f"{command} --dry-run")
    else:
        environment, name = re.fullmatch(r"(\.venv(?:-vllm)?)/bin/(\w+)", program).groups()
        assert environment == (".venv-vllm" if "tests/vllm" in command else ".venv")
        assert (Path(sys.executable).parent / name).exists()


@pytest.mark.parametrize("command", SERVES)
def test_kalm_serve_and_the_variables_that_lead_there(command: str, venv: Path) -> None:
    variable, kalm, *arguments = shlex.split(command)
    block = re.search(r"```text\n(KALM_BASE_URL.*?) python your_app.py", ARGUMENTS, re.DOTALL)
    assert block is not None
    settings = dict(pair.split("=", 1) for pair in shlex.split(block[1].replace("\\\n", " ")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings["KALM_BASE_URL"] = settings["KALM_BASE_URL"].replace("8000", str(port))
    arguments = [argument.replace("8000", str(port)) for argument in arguments]
    server = subprocess.Popen(
        [str(venv / kalm.removeprefix(".venv/")), *arguments],
        env=os.environ | dict([variable.split("=", 1)]),
        stderr=subprocess.PIPE,
        text=True,
    )
    with server:
        assert server.stderr is not None
        for line in server.stderr:
            if "ready: " in line:
                break
        app = "from kalm_integrations import *; print(KalmClient().embed(['x']).vectors.shape)"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", app.replace("*", "KalmClient")],
            check=False,
            capture_output=True,
            text=True,
            env=os.environ | settings,
        )
        server.terminate()
        assert (done.stdout, done.stderr) == ("(1, 512)\n", "")
