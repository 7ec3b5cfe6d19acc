"""Executes the notebooks of examples/.

python tests/notebooks.py    # all of them, in place: `make notebooks`
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401  # its first import is slow, and would say so in a cell
import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""All that a notebook says of its kernel: no version, which would change with each machine."""


class ThisPython(AsyncKernelManager):
    """Starts this Python as the kernel, whatever else is installed; there warnings are errors."""

    @property
    def kernel_spec(self) -> KernelSpec:
        # ipykernel warns of itself as it shuts down.
        warnings = ["-W", "error", "-W", "ignore::PendingDeprecationWarning:ipykernel.kernelbase"]
        launch = ["-m", "ipykernel_launcher", "--log-level=ERROR", "-f", "{connection_file}"]
        return KernelSpec(argv=[sys.executable, *warnings, *launch], **METADATA["kernelspec"])


def read(path: Path) -> Any:
    """A notebook, checked against its format."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def executed(notebook: Any, environment: Mapping[str, str] | None = None) -> Any:
    """A copy of `notebook`, run from top to bottom in a copy of examples/.

    Args:
        notebook: Stays as it is.
        environment: Variables for it, beside those of this process that do not lead it elsewhere.

    Raises:
        CellExecutionError: A cell failed.
    """
    theirs = ("KALM_", "MODAL_", "OPENAI_", "CHAT_MODEL", "MPLBACKEND")
    outside = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    ran = nbformat.from_dict(notebook)
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(EXAMPLES, Path(scratch) / "examples")
        client = NotebookClient(
            ran,
            kernel_manager_class=ThisPython,
            resources={"metadata": {"path": str(folder)}},
            record_timing=False,
            coalesce_streams=True,
            timeout=300,
        )
        client.execute(env=outside | {"IPYTHONDIR": scratch} | dict(environment or {}))
    ran.metadata = nbformat.from_dict(METADATA)
    return ran


def main() -> None:
    for path in NOTEBOOKS:
        print(path.name)
        nbformat.write(executed(read(path)), path)


if __name__ == "__main__":
    main()
