"""How to install what is missing."""

from __future__ import annotations

import json

NAME = "kalm-integrations"


def install_command(extra: str) -> str:
    """The pip command that adds `extra` to this installation.

    A checkout is named by its path: its version need not be in any index.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        origin = json.loads(distribution(NAME).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        origin = {}
    path = origin.get("url", "").removeprefix("file://") if "dir_info" in origin else ""
    return f"pip install '{path or NAME}[{extra}]'"
