"""Runs `make simulate`, `make soak` or `make test-matrix` and writes the tables that it prints into
docs/reliability.md, unless it fails.

    python tests/tools/record.py soak [SECONDS=60]
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/reliability.md"


def main() -> int:
    """Return make's status."""
    command = ["make", *sys.argv[1:]]
    # The commit that is tested, not one that is made meanwhile.
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(
        git, check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        return process.returncode
    tables = re.findall(r"(?:^\|.*\n)+", "".join(lines), flags=re.MULTILINE)
    where = f"{platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    text = f"{date.today():%-d %B %Y}, commit {commit}, {where}: `{' '.join(command)}`\n\n"
    text += "\n".join(tables)
    start, end = f"<!-- {sys.argv[1]} -->\n", f"<!-- end of {sys.argv[1]} -->"
    before, _, rest = PAGE.read_text().partition(start)
    _, _, after = rest.partition(end)
    PAGE.write_text(before + start + text + end + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
