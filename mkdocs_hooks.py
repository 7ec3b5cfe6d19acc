"""Hooks of mkdocs.yml: the pages are written for GitHub, where links are paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
NAMED_BY_FILE = re.compile(r"\[([\w-]+\.md)\]\((?=\1[#)])")


def on_page_markdown(markdown: str, *, config: Any, **_: object) -> str:
    """Lead links outside docs/ to the repository; name a page by its title, not its file."""
    repository, titles = config.extra["social"][0]["link"], dict(_titles(config.nav))

    def absolute(link: re.Match[str]) -> str:
        path, anchor = link[1], link[2] or ""
        if not (ROOT / path).exists():
            return link[0]  # the strict build reports it
        return f"]({repository}/blob/main/{path}{anchor})"

    def titled(link: re.Match[str]) -> str:
        return f"[{titles.get(link[1], link[1])}]("

    return NAMED_BY_FILE.sub(titled, OUTSIDE.sub(absolute, markdown))


def _titles(nav: list[Any]) -> Iterator[tuple[str, str]]:
    """The file and the title of each page of the navigation."""
    for entry in nav:
        for title, content in entry.items() if isinstance(entry, dict) else ():
            if isinstance(content, str):
                yield content, title
            else:
                yield from _titles(content)
