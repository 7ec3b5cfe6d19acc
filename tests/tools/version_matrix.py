"""Tests the wheel with the lowest and the newest versions of its dependencies, on each Python.

`make test-matrix` gives it the files of `make test-fast`. Each cell is a new environment. The
lowest versions are those that pyproject.toml and the other packages allow (langchain-tests is one),
and that have a wheel for this Python: numpy 2.0 has none for 3.13. Warnings are not errors here:
old packages warn on a new Python. PYTHONS="3.11 /opt/python3.14" chooses.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHONS = os.environ.get("PYTHONS", "3.11 3.12 3.13 3.14").split()
SHOWN = ("langchain-core", "llama-index-core", "pydantic", "numpy", "aiohttp", "modal")
EXTRAS = ("quickstart", "modal", "eval", "otel", "socks")
TOOLS = ("hypothesis", "jsonschema", "langchain-tests", "psutil", "pytest")
PYENV = map(str, sorted(Path.home().glob(".pyenv/versions/*/bin")))
ENVIRONMENT = {**os.environ, "PATH": os.pathsep.join([*PYENV, os.environ["PATH"]])}


def run(*command: str | Path) -> tuple[int, str]:
    """Exit status and output."""
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    return done.returncode, done.stdout + done.stderr


def uv(*arguments: str | Path) -> str:
    status, output = run(sys.executable, "-m", "uv", *arguments)
    if status:
        raise RuntimeError(output)
    return output


def install(folder: Path, resolution: str) -> dict[str, str]:
    """Install the wheel and the tests' tools; the versions of the wheel's dependencies."""
    options = ("--python", folder, "--only-binary", ":all:", "--link-mode", "copy")
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = [each for each in project["optional-dependencies"]["dev"] if each.startswith(TOOLS)]
    wanted = ("-r", "pyproject.toml", *extras, *(each for each in tools if "langchain" in each))
    uv("pip", "install", *options, "--resolution", resolution, *wanted)
    versions = uv("pip", "freeze", "--quiet", "--python", folder)
    (folder / "versions").write_text(versions)
    (wheel,) = folder.parent.glob("*.whl")
    uv("pip", "install", *options, "--constraint", folder / "versions", *tools, wheel)
    return dict(line.split("==") for line in versions.splitlines() if "==" in line)


def test(folder: Path, files: list[str]) -> tuple[str, bool]:
    """What pytest's last line says, and whether all tests passed."""
    options = ("--fast", "--numprocesses", "2", "--dist", "loadfile", "-p", "no:cacheprovider")
    # A plugin of langchain-tests, which Python 3.14 does not load.
    options += ("-p", "no:codspeed", "--override-ini", "filterwarnings=default")
    status, output = run(folder / "bin/pytest", *options, *files)
    print(output, file=sys.stderr)
    end = re.search(r"^=+ (.*) in .*$", output.splitlines()[-1])
    return end[1] if end else f"exit status {status}", not status


def cell(python: str, resolution: str, folder: Path, files: list[str]) -> tuple[list[str], bool]:
    """A row of the table, and whether all is well."""
    versions: dict[str, str] = {}
    try:
        uv("venv", "--clear", "--python", python, folder)
        python = run(
            folder / "bin/python", "-c", "import platform as p; print(p.python_version())"
        )[1]
        versions = install(folder, resolution)
        result, good = test(folder, files)
    except RuntimeError as error:
        found = (folder / "bin/python").exists()
        print(error, file=sys.stderr)
        result, good = ("cannot be installed", False) if found else ("no such Python here", True)
    shown = [versions.get(name, "") for name in SHOWN]
    return [python.strip(), resolution.removesuffix("-direct"), *shown, result], good


def main() -> int:
    """Print the table; 1 if something failed."""
    rows, all_good = [["Python", "versions", *SHOWN, "tests"]], True
    rows.append(["---"] * len(rows[0]))
    with tempfile.TemporaryDirectory() as folder:
        uv("build", "--wheel", "--out-dir", folder, ROOT)
        for python in PYTHONS:
            for resolution in ("lowest-direct", "highest"):
                environment = Path(folder, f"{len(rows)}")
                row, good = cell(python, resolution, environment, sys.argv[1:])
                rows.append(row)
                all_good &= good
    print("".join(f"| {' | '.join(row)} |\n" for row in rows), end="")
    return not all_good


if __name__ == "__main__":
    sys.exit(main())
