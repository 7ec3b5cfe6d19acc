"""docs/compatibility.md: its versions are those of pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from modal_backend.image import CUDA

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/compatibility.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
VERSIONS = re.findall(r"^\| ([\w-]+) \| ([<>=].*?) \| .+ \| (?:`([\w-]+)`)? ?\|$", PAGE, re.M)


def test_the_ranges_are_those_of_the_package() -> None:
    for name, versions, extra in VERSIONS:
        if name == "Python":
            declared = SpecifierSet(PROJECT["requires-python"])
        else:
            lines = EXTRAS[extra] if extra else PROJECT["dependencies"]
            requirements = {each.name: each for each in map(Requirement, lines)}
            declared = requirements[name].specifier
        assert SpecifierSet(versions) == declared, name


def test_the_framework_of_every_adapter_is_there() -> None:
    frameworks = {"langchain", "llama-index", "haystack", "chroma", "lancedb", "modal", "vllm"}
    assert frameworks <= {extra for _, _, extra in VERSIONS}


def test_every_python_is_there() -> None:
    (python,) = re.findall(r"^\| Python \|.*$", PAGE, re.M)
    declared = re.findall(r":: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.M)
    assert len(declared) > 2
    assert set(declared) <= set(re.findall(r"3\.\d+", python))


def test_cuda() -> None:
    assert f"| CUDA | not needed | {CUDA.rpartition('.')[0]}:" in PAGE
