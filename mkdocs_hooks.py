"""A hook of mkdocs.yml: links of pages to files outside docs/ lead to the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, config: Any, **_: object) -> str:
    """Make these links absolute; called by MkDocs for each page."""
    repository = config.extra["social"][0]["link"]

    def absolute(link: re.Match[str]) -> str:
        path, anchor = link[1], link[2] or ""
        if not (ROOT / path).exists():
            return link[0]  # the strict build reports it
        return f"]({repository}/blob/main/{path}{anchor})"

    return OUTSIDE.sub(absolute, markdown)
