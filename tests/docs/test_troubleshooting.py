"""docs/troubleshooting.md quotes what the code says: each fixed part of a message is in the source.

A message is looked for in one string of the source at a time, its placeholders being gaps.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
QUOTED = re.findall(r"^> `(.+)`$", PAGE, re.MULTILINE)
GAP: Final = "…"
THEIRS: Final = {
    "Token missing. Could not authenticate client.": "modal/client.py",
}
"""Messages that a library of ours says."""
PARTS: Final = {
    # Said by several modules together; each part is looked for.
    "texts[…] is white space only": ["texts[…] …", "is white space only"],
    "texts[…] has a lone surrogate at character …": [
        "texts[…] …",
        "has a lone surrogate at character …",
    ],
    "texts[…] is too long: … tokens, over the limit of …": [
        "texts[…] …",
        "is too long: … tokens, over the limit of …",
    ],
    "no response for 5 s: the service may be starting, which can take minutes; waiting for up to "
    "timeout=600 s": [
        "no response for %g s: the service may be starting, which can take minutes; waiting for up "
        "to timeout=%g s"
    ],
    "Modal app …, class … is not what this client needs": [
        "Modal app …, class …",
        "{location} is not what this client needs",
    ],
    "a container of Modal app … failed": [
        "a container of {location} failed",
        "Modal app …, class …",
    ],
}


def said() -> Iterator[str]:
    """Every string of the sources, with gaps where something is set in."""
    for package in ("kalm_integrations", "modal_backend"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(
                        str(part.value) if isinstance(part, ast.Constant) else GAP
                        for part in node.values
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


SAID = list(said())


@pytest.mark.parametrize("message", QUOTED)
def test_every_message_is_what_the_code_says(message: str) -> None:
    if message in THEIRS:
        library = __import__("aiohttp")
        source = Path(library.__file__).parent.parent / THEIRS[message]
        assert message.removesuffix(GAP) in source.read_text()
        return
    for part in PARTS.get(message, [message]):
        gaps = "[^\n]{0,60}?".join(map(re.escape, part.split(GAP)))
        assert any(re.search(gaps, string) for string in SAID), part


def test_there_are_enough_and_none_twice() -> None:
    assert len(set(QUOTED)) == len(QUOTED) > 15
    assert PARTS.keys() | THEIRS.keys() <= set(QUOTED)


def test_each_section_quotes_a_message_and_ends_with_advice() -> None:
    for section in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        name, *lines = [line for line in section.splitlines() if line and line[0] != "#"]
        assert lines[0].startswith("> `"), name
        assert not lines[-1].startswith(">"), name
